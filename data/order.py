"""Which row a sample number stands for, computed in O(1): a keyed permutation and a blend by weight."""

import hashlib
import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ROUNDS = 8  # a Feistel network is a good shuffle from 4 rounds on; domains of a few rows deserve more
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's finaliser


class Permutation:
    """A bijection of range(size) chosen by a key and evaluated anywhere, with nothing stored.

    A balanced Feistel network on the smallest even number of bits that holds `size` (Luby and Rackoff 1988);
    images outside range(size) are sent through it again until they fall inside (cycle walking, Black and
    Rogaway 2002), which takes less than four passes on average.
    """

    def __init__(self, size: int, *key: int) -> None:
        assert size >= 1, size
        self.size = size
        self._half_bits = np.uint64(((size - 1).bit_length() + 1) // 2 or 1)
        self._mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images, int64, of `indices` in range(size)."""
        images = self._encrypt(indices.astype(np.uint64))
        while (outside := images >= self.size).any():
            images[outside] = self._encrypt(images[outside])
        return images.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            mixed = right ^ key
            for multiplier in MULTIPLIERS:
                mixed = (mixed ^ (mixed >> np.uint64(29))) * multiplier
            left, right = right, left ^ ((mixed >> np.uint64(32)) & self._mask)
        return (left << self._half_bits) | right


class Blend:
    """Deals samples out to corpora by weight: sample n goes to one corpus and is its m-th sample there.

    A Huffman tree over the weights; of the n samples that enter a node, exactly floor(n p + 1/2) go left, p being
    the left branch's share as an exact fraction. Sample numbers are located from the root in O(corpora), without
    looking at other samples. After n samples a corpus of weight w (weights summing to 1) has had n w of
    them to within 1.68: one half for rounding at each node above, damped by the weights in between, which grow at
    least like Fibonacci numbers in a Huffman tree.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        heap: list[tuple[Fraction, int, int | tuple]] = [
            (Fraction(weight), corpus, corpus) for corpus, weight in enumerate(weights)
        ]
        heapq.heapify(heap)
        for order in range(len(weights), 2 * len(weights) - 1):
            right_weight, _, right = heapq.heappop(heap)
            left_weight, _, left = heapq.heappop(heap)
            total = left_weight + right_weight
            heapq.heappush(heap, (total, order, ((left_weight / total).as_integer_ratio(), left, right)))
        self._root = heap[0][2]

    def locate(self, sample: int) -> tuple[int, int]:
        """(corpus, number of the sample within that corpus) for a sample number >= 0."""
        node = self._root
        while isinstance(node, tuple):
            share, left, right = node
            to_left = _rounded_share(sample, *share)
            if _rounded_share(sample + 1, *share) > to_left:
                node, sample = left, to_left
            else:
                node, sample = right, sample - to_left
        return node, sample


def _rounded_share(count: int, numerator: int, denominator: int) -> int:
    """floor(count * numerator / denominator + 1/2), exactly."""
    return (2 * count * numerator + denominator) // (2 * denominator)
