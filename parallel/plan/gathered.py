"""How much ZeRO 3 gathers for one microbatch: each weight when it is used, unless it is still there."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

MAX_REUSE_DISTANCE = 1_000_000_000
"""Entries used in between up to which DeepSpeed keeps gathered weights that are needed again."""

PREFETCHED = 50_000_000
"""Entries that it gathers at once."""


def gathered(units: Sequence[Mapping[str, int]], reuse_distance: int) -> dict[str, int]:
    """How often each weight is gathered in a forward and a backward pass.

    Args:
        units: entries of the weights that each part of the model uses, by name, in the order of the forward pass.
        reuse_distance: weights stay where the parts used before their next use have fewer entries.
    """
    uses = [*units, *reversed(units)]
    before = [0, *accumulate(sum(unit.values()) for unit in uses)]
    times: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, unit in enumerate(uses):
        for name in unit:
            if name not in last or before[i] - before[last[name] + 1] >= reuse_distance:
                times[name] = times.get(name, 0) + 1
            last[name] = i
    return times
