"""Samples that a run leaves out: brute force over small cases, and exactness on any number of ranks."""

import itertools
import random

import pytest
import torch

from data.config import DataConfig
from data.loader import Loader
from data.skipped import check_ranges, kept_sample, skip


def numbers(ranges: object) -> set[int]:
    return {number for first, last in ranges for number in range(first, last + 1)}


def test_ranges_and_places_are_those_of_a_list() -> None:
    draw = random.Random(0)
    for _ in range(300):
        skipped, left_out = (), set()
        for _ in range(draw.randrange(6)):
            first = draw.randrange(40)
            last = first + draw.randrange(8)
            skipped = skip(skipped, first, last)
            left_out |= set(range(first, last + 1))
        assert numbers(skipped) == left_out
        assert check_ranges([list(pair) for pair in skipped]) == skipped, "ascending and apart"
        kept = (number for number in itertools.count() if number not in left_out)
        assert [kept_sample(count, skipped) for count in range(50)] == list(itertools.islice(kept, 50))


@pytest.mark.parametrize("ranges", [[[3, 2]], [[-1, 4]], [[5, 6], [1, 2]], [[1, 4], [5, 6]], [[1]], [1], [["a", 2]]])
def test_ranges_that_are_none_are_refused(ranges: list) -> None:
    with pytest.raises(ValueError, match=r"skipped: .*; must be ascending pairs \[first, last\]"):
        check_ranges(ranges)


def loader(dp_rank: int = 0, dp_size: int = 1, micro_batch_size: int = 1) -> Loader:
    config = DataConfig(source="synthetic:recall", sequence_length=24, prefetch=2)
    return Loader(
        config,
        split="train",
        batch_size=8,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=32,
    )


def rows(batches: object, steps: int) -> list[torch.Tensor]:
    """The input ids of the first steps, one microbatch a row."""
    return [batch.input_ids for step in itertools.islice(batches, steps) for batch in step]


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 8), (2, 4), (2, 2), (4, 1)])
def test_the_same_samples_on_any_number_of_ranks(dp_size: int, micro_batch_size: int) -> None:
    skipped = skip(skip((), 3, 5), 16, 31)
    everything = torch.cat(rows(loader().batches(0), 8))
    expected = everything[[kept_sample(count, skipped) for count in range(32)]]
    found = torch.empty_like(expected)
    for rank in range(dp_size):
        share = loader(rank, dp_size, micro_batch_size)
        for step, microbatches in enumerate(itertools.islice(share.batches(8, skipped), 3), start=1):
            for m, batch in enumerate(microbatches):
                start = 8 * step + (m * dp_size + rank) * micro_batch_size
                found[start : start + micro_batch_size] = batch.input_ids
    assert torch.equal(found[8:], expected[8:])


def test_a_step_left_out_on_the_way_changes_nothing_about_what_follows() -> None:
    """The loop goes on reading from the same iterator; a resumed run begins a new one."""
    share = loader()
    first, last = share.samples(8)
    assert (first, last) == (8, 15)
    on = rows(share.batches(0), 5)[2 * 8 :]
    resumed = rows(share.batches(8, skip((), first, last)), 3)
    assert all(torch.equal(a, b) for a, b in zip(on, resumed, strict=True))
    assert share.samples(8, skip((), first, last)) == (16, 23)
