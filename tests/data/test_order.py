import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Blend, Permutation


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 5000), key=st.lists(st.integers(0, 2**63), max_size=4))
def test_permutation_is_a_bijection(size: int, key: list[int]) -> None:
    images = Permutation(size, *key)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_permutation_is_evaluated_anywhere_at_no_cost() -> None:
    size = 10**12 + 7
    indices = np.array([0, 1, size // 2, size - 1])
    images = Permutation(size, 1)(indices)
    assert len(set(images.tolist())) == 4
    assert images.min() >= 0
    assert images.max() < size
    assert Permutation(size, 1)(indices[2:3]) == images[2]


def test_keys_give_unrelated_orders() -> None:
    size = 10_000
    orders = [
        Permutation(size, *key)(np.arange(size)) for key in ((0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0), (1, 0, 0, 0))
    ]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10  # 1 is expected of independent orders
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert all(abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05 for order in orders)


@pytest.mark.parametrize("size", [3, 7, 16])
def test_every_place_goes_everywhere_equally_often(size: int) -> None:
    keys = 1000
    images = np.stack([Permutation(size, key)(np.arange(size)) for key in range(keys)])
    for place in range(size):
        counts = np.bincount(images[:, place], minlength=size)
        chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
        assert chi_square < size + 6 * (2 * size) ** 0.5, (place, counts)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_blend_follows_weights_and_counts_per_corpus(weights: list[float]) -> None:
    blend = Blend(weights)
    seen: Counter[int] = Counter()
    for sample in range(300):
        corpus, number = blend.locate(sample)
        assert number == seen[corpus]
        seen[corpus] += 1
        for index, weight in enumerate(weights):
            assert abs(seen[index] - (sample + 1) * weight / sum(weights)) < 1.69


def test_blend_far_out_needs_no_scan() -> None:
    blend, sample = Blend([0.7, 0.2, 0.1]), 10**15
    corpus, number = blend.locate(sample)
    assert number == pytest.approx(sample * [0.7, 0.2, 0.1][corpus], abs=2)
    numbers = dict.fromkeys(range(3), 0)
    for following in range(sample, sample + 50):
        corpus, number = blend.locate(following)
        assert numbers[corpus] in (0, number - 1)
        numbers[corpus] = number
    assert all(numbers.values())


def test_one_corpus_gets_every_sample() -> None:
    assert [Blend([0.3]).locate(sample) for sample in (0, 1, 10**12)] == [(0, 0), (0, 1), (0, 10**12)]
