"""Ranges of samples that a run leaves out, and which samples remain.

Consumed samples count what was trained on; what was left out is kept beside them as inclusive ranges of sample numbers.
The position in the data is a pure function of the two.
"""

from collections.abc import Iterable

Ranges = tuple[tuple[int, int], ...]
"""(first, last) of each range, both left out; ascending, with at least one sample between two ranges."""


def kept_sample(count: int, skipped: Ranges) -> int:
    """The number of the sample that `count` samples that are not skipped come before."""
    number = count
    for first, last in skipped:
        if number < first:
            break
        number += last - first + 1
    return number


def skip(skipped: Ranges, first: int, last: int) -> Ranges:
    """`skipped` with the samples `first` to `last` besides."""
    assert 0 <= first <= last, (first, last)
    merged: list[tuple[int, int]] = []
    for lower, upper in sorted([*skipped, (first, last)]):
        if merged and lower <= merged[-1][1] + 1:
            lower, upper = merged[-1][0], max(upper, merged.pop()[1])
        merged.append((lower, upper))
    return tuple(merged)


def check_ranges(ranges: Iterable[Iterable[int]]) -> Ranges:
    """The ranges that a checkpoint holds; ValueError if they are not as `skip` makes them."""
    try:
        skipped = tuple((int(first), int(last)) for first, last in ranges)
    except (TypeError, ValueError):
        skipped = ((0, -1),)
    numbers = [-2, *(bound for pair in skipped for bound in pair)]
    gaps = [after - before for before, after in zip(numbers, numbers[1:])]
    if any(gap < 2 for gap in gaps[::2]) or any(gap < 0 for gap in gaps[1::2]):
        raise ValueError(f"skipped: {ranges}; must be ascending pairs [first, last]; use another checkpoint")
    return skipped
