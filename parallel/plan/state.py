"""What DeepSpeed 0.19 holds of a rank's parameters: weights, gradients and optimizer state, in bytes.

Parameters, gradients, master weights and moments are fp32 in every precision. AdamW's groups are laid out one after the
other; ZeRO 1 and 2 cut each group's flat tensor into equal parts, ZeRO 3 each parameter. A test holds every figure
against the tensors of real engines.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.config import REDUCE_BUCKET_SIZE

WORD = 4
"""Bytes of an fp32 number."""

LARGEST_SUBGROUP = 1_000_000_000
"""Entries of its share that ZeRO 3 updates at once."""

PERSISTENT = 100_000
"""Entries up to which ZeRO 3 keeps a parameter whole."""

MAX_GATHERED = 1_000_000_000
"""Entries of gathered weights that ZeRO 3 keeps until they are needed again, at most."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """
    Attributes:
        weights: held from step to step.
        optimizer: master weights, moments and step counts.
        gradients: held while the last microbatch runs backward, when activations are largest.
        at_step: gradients that are there when the optimizer is called for the first group.
        reduced: gradients at their largest between the last backward pass and the update.
        buffers: what is reduced at once, and weights gathered for a moment.
        entries: parameters that the rank would hold without ZeRO.
        share: of them, those that it updates, what fills up included.
        host: bytes in the machine's memory.
    """

    weights: int
    optimizer: int
    gradients: int
    at_step: int
    reduced: int
    buffers: int
    entries: int
    share: int
    host: int = 0

    @property
    def held(self) -> int:
        return self.weights + self.optimizer


def state_bytes(
    groups: Sequence[Sequence[int]],
    *,
    zero: int,
    ranks: int,
    index: int = 0,
    accumulates: bool = True,
    bucket: int = REDUCE_BUCKET_SIZE,
    persistent: int = PERSISTENT,
    offloads: frozenset[str] = frozenset(),
) -> StateBytes:
    """
    Args:
        groups: entries of each parameter that the rank's stage and tensor rank hold, by AdamW's groups, in their order.
        zero: ZeRO's stage.
        ranks, index: that share state, data and sequence ranks together, and which of them this is.
        accumulates: whether a step has several microbatches.
        bucket: entries that are reduced at once.
        persistent: entries up to which ZeRO 3 keeps a parameter whole.
        offloads: of `weights` and `optimizer`, what is kept in the machine's memory.
    """
    total = sum(map(sum, groups))
    if zero == 0:
        counters = sum(map(len, groups))
        whole = WORD * total
        return StateBytes(
            weights=whole,
            optimizer=2 * whole + WORD * counters,
            gradients=whole,
            at_step=whole,
            reduced=whole + WORD * min(bucket, total) * 2,  # a bucket is flattened, reduced and copied back
            buffers=0,
            entries=total,
            share=total,
        )
    if zero == 3:
        return _scattered(groups, ranks, accumulates, bucket, persistent, offloads)
    flat = [padded(sum(group), ranks) for group in groups]
    owned = WORD * sum(_owned(group, size // ranks, index) for group, size in zip(groups, flat))
    share = WORD * sum(flat) // ranks
    optimizer = 3 * share + WORD * len(groups)
    if "optimizer" in offloads:
        largest = WORD * max(itertools.chain.from_iterable(groups))
        gradients = WORD * total if zero == 1 else largest
        return StateBytes(
            weights=WORD * sum(flat),
            optimizer=0,
            gradients=gradients,
            at_step=largest,
            reduced=gradients + largest,
            buffers=WORD * bucket + largest,
            entries=total,
            share=share // WORD,
            host=optimizer + 2 * share,
        )
    # What fills up the later groups' parts is there, too, while the first group is updated.
    filling = sum(_filling(sum(group), size // ranks, index) for group, size in zip(groups[1:], flat[1:]))
    at_step = owned + WORD * flat[0] // ranks + WORD * filling
    whole = WORD * total
    return StateBytes(
        weights=WORD * sum(flat),
        optimizer=optimizer,
        gradients=whole if zero == 1 else (2 if accumulates else 1) * owned,
        at_step=at_step,
        reduced=max(at_step, whole + owned) if zero == 1 else at_step,
        buffers=WORD * bucket,
        entries=total,
        share=share // WORD,
    )


def padded(entries: int, ranks: int) -> int:
    """Of a group's flat tensor: a multiple of twice the ranks."""
    return math.ceil(entries / (2 * ranks)) * 2 * ranks


def share_of_group(group: Sequence[int], ranks: int, zero: int) -> int:
    """Entries of the group's master weights on each rank."""
    if zero == 0:
        return sum(group)
    return sum(math.ceil(n / ranks) for n in group) if zero == 3 else padded(sum(group), ranks) // ranks


def _owned(group: Sequence[int], size: int, index: int) -> int:
    """Entries of the parameters of which part `index` of `size` entries holds any: their gradients are kept whole."""
    first, after = index * size, (index + 1) * size
    return sum(n for start, n in _placed(group) if start < after and start + n > first)


def _filling(entries: int, size: int, index: int) -> int:
    """Of part `index` of `size` entries, those behind the group's."""
    return min(size, max(0, (index + 1) * size - entries))


def _placed(group: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(itertools.accumulate(group, initial=0), group)


def _scattered(
    groups: Sequence[Sequence[int]],
    ranks: int,
    accumulates: bool,
    bucket: int,
    persistent: int,
    offloads: frozenset[str],
) -> StateBytes:
    everything = list(itertools.chain.from_iterable(groups))
    shares = [share_of_group(group, ranks, 3) for group in groups]
    share = WORD * sum(shares)
    kept = WORD * sum(math.ceil(n / ranks) * ranks for n in everything if n <= persistent)
    parts = [min(size, LARGEST_SUBGROUP) for size in shares]
    optimizer = 3 * share + WORD * sum(math.ceil(size / LARGEST_SUBGROUP) for size in shares)
    gathered = WORD * min(sum(everything), MAX_GATHERED + max(everything))
    on_host = (optimizer + share if "optimizer" in offloads else 0) + (share if "weights" in offloads else 0)
    gradients = 0 if "optimizer" in offloads else share
    at_step = gradients + (0 if "optimizer" in offloads else WORD * parts[0])
    return StateBytes(
        weights=(0 if "weights" in offloads else share) + kept,
        optimizer=0 if "optimizer" in offloads else optimizer,
        gradients=gradients,
        at_step=at_step,
        reduced=gradients + (0 if "optimizer" in offloads else WORD * max(parts)),
        buffers=WORD * bucket + gathered,
        entries=sum(everything),
        share=sum(shares),
        host=on_host,
    )
