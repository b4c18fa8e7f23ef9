"""Tensor and sequence ranks: losses and every parameter's gradient equal to one process, from non-trivial weights."""

from typing import Any

import pytest
from torch import Tensor

from parallel.grid import Grid
from tests.parallel.mixed import alone, config_of, together

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return alone(config_of())


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS of each."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - z).norm() / z.norm()) for name, z in expected.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = {name: error for name, error in errors(found, expected).items() if not error <= TOLERANCE}
    assert not wrong


def arrangements(grid: Grid, splits: list[tuple[int, int]], **settings: Any) -> list[dict[str, Tensor]]:
    return [together(grid, *split, settings)[0] for split in splits]


@pytest.mark.parametrize(("size", "splits"), [(2, [(2, 1), (1, 2)]), (4, [(4, 1), (1, 4), (2, 2)])])
def test_gradients_equal_one_process(
    ranks: Any, expected: dict[str, Tensor], size: int, splits: list[tuple[int, int]]
) -> None:
    assert all(z.norm() > 0 for z in expected.values()), "every parameter counts"
    for of_rank in ranks(size).run(arrangements, splits=splits):
        for found in of_rank:
            assert_equal(found, expected)


def with_sharded_norms(grid: Grid, splits: list[tuple[int, int]], **settings: Any) -> list[dict[str, Tensor]]:
    return [together(grid, *split, settings, sharded_norms=True)[0] for split in splits]


@pytest.mark.parametrize(("size", "splits"), [(2, [(1, 2)]), (4, [(2, 2)])])
def test_norms_and_residuals_of_a_share_of_the_tokens(
    ranks: Any, expected: dict[str, Tensor], size: int, splits: list[tuple[int, int]]
) -> None:
    for of_rank in ranks(size).run(with_sharded_norms, splits=splits):
        for found in of_rank:
            assert_equal(found, expected)


POST_NORM: dict[str, Any] = {
    "layers": ("attention", "rglru"),
    "tied": False,
    "changes": {"model": {"post_norm": ("attention",)}},
}


def test_sharded_norms_after_a_mixer(ranks: Any) -> None:
    wanted = alone(config_of(**POST_NORM))
    for (found,) in ranks(2).run(with_sharded_norms, splits=[(1, 2)], **POST_NORM):
        assert_equal(found, wanted)


def test_an_untied_head(ranks: Any) -> None:
    settings: dict[str, Any] = {"layers": ("rglru",), "tied": False}
    wanted = alone(config_of(**settings))
    for (found,) in ranks(2).run(arrangements, splits=[(1, 2)], **settings):
        assert_equal(found, wanted)
