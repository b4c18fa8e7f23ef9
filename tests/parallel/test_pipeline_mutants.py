"""Bugs that pipelines are known to have: each must show in loss, norm or gradients, by far."""

from typing import Any

from torch import Tensor

from parallel.grid import Grid
from tests.parallel.engines import Split, alone_in_float64, curve, curve_alone, step_in_float64, worst
from tests.parallel.mixed import config_of
from tests.parallel.test_mutants import NOTICED

SETTINGS: dict[str, Any] = {"layers": ("hgrn2", "hgrn2", "hgrn2", "rglru", "hgrn2")}
SPLIT = Split(2, stages=(3, 2))
"""Both stages read the lower bounds, also where the second begins one block sooner or later."""


def with_each(grid: Grid) -> dict[str, dict[str, Tensor]]:
    """By mutant, and without one."""
    from tests.parallel.pipeline_mutants import PIPELINE

    found = {"none": step_in_float64(grid, SPLIT, SETTINGS)}
    for name, mutant in PIPELINE.items():
        with mutant():
            found[name] = step_in_float64(grid, SPLIT, SETTINGS)
    return found


def test_each_bug_shows(ranks: Any) -> None:
    expected = alone_in_float64(config_of(**SETTINGS))
    of_ranks = ranks(2).run(with_each)
    errors = {name: max(worst([found[name] for found in of_ranks], expected).values()) for name in of_ranks[0]}
    assert errors.pop("none") <= 1e-9
    assert len(errors) >= 8
    unnoticed = {name: error for name, error in errors.items() if error < NOTICED}
    assert not unnoticed


def norms(grid: Grid) -> tuple[float, float]:
    """Of the first step under ZeRO 1, without and with the bug."""
    from tests.parallel.pipeline_mutants import PIPELINE_NORM

    right = curve(grid, SPLIT, SETTINGS)[0][0][2]
    with PIPELINE_NORM():
        return right, curve(grid, SPLIT, SETTINGS)[0][0][2]


def test_what_stages_share_counts_once_in_the_norm(ranks: Any) -> None:
    wanted = curve_alone(config_of(**SETTINGS))[0][0][2]
    for right, wrong in ranks(2).run(norms):
        assert abs(right / wanted - 1) <= 1e-5
        assert abs(wrong / wanted - 1) > NOTICED
