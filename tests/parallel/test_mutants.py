"""Bugs that parallel code is known to have: each must show in losses or gradients, by far."""

from typing import Any

import pytest
from torch import Tensor

from parallel.grid import Grid
from tests.parallel.mixed import alone, config_of, together
from tests.parallel.mutants import CHAINED, SEQUENCE, SHARDED, TENSOR
from tests.parallel.test_partition import assert_equal, errors

NOTICED = 1e-4
"""Relative RMS; without a bug it is below 1e-9."""

AXES = {
    "tensor": (2, (1, 2), TENSOR),
    "sequence": (2, (2, 1), SEQUENCE),
    "three slices": (3, (3, 1), CHAINED),
    "sharded norms": (2, (1, 2), SHARDED),
}
"""Ranks, (sequence, tensor), mutants."""


def with_each(grid: Grid, axis: str) -> dict[str, dict[str, Tensor]]:
    """By mutant, and by the layers of the models without one."""
    _, split, mutants = AXES[axis]
    found = {}
    for layers in dict.fromkeys(layers for layers, _ in mutants.values()):
        found[layers[0]] = together(grid, *split, {"layers": layers}, mutants is SHARDED)[0]
    for name, (layers, mutant) in mutants.items():
        with mutant():
            found[name] = together(grid, *split, {"layers": layers}, mutants is SHARDED)[0]
    return found


@pytest.mark.parametrize("axis", AXES)
def test_each_bug_shows(ranks: Any, axis: str) -> None:
    size, _, mutants = AXES[axis]
    expected = {layers: alone(config_of(layers)) for layers in dict.fromkeys(layers for layers, _ in mutants.values())}
    of_ranks = ranks(size).run(with_each, axis=axis)
    for layers, wanted in expected.items():
        for found in of_ranks:
            assert_equal(found[layers[0]], wanted)
    unnoticed = [
        name
        for name, (layers, _) in mutants.items()
        if max(max(errors(found[name], expected[layers]).values()) for found in of_ranks) < NOTICED
    ]
    assert not unnoticed
