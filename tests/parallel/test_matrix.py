"""Every arrangement of ranks, for each family and a stack of every mixer: `make test-parallel`, which prints the table
that docs/parallelism.md keeps.

Loss and gradient norm of 5 steps, and each parameter's gradient at the first of them, are those of one process in fp32.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.engines import Curve, Split, curve, curve_alone, worst
from tests.parallel.mixed import config_of
from tests.parallel.test_pipeline import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.parallel_matrix]

TOLERANCE = 1e-5
THREE_HEADS = {"heads": 6, "kv_heads": 3}
"""Three ranks that exchange heads need a number of them that three divides."""


def arrangements() -> dict[tuple[Split, int], tuple[str, ...]]:
    """Splits with the number of ranks along the data axis, and the families they are for."""
    two = [(pp, sp, tp, dp) for dp, pp, sp, tp in itertools.product((1, 2), repeat=4) if pp * sp * tp * dp <= 4]
    more = [(1, 3, 1, 1), (1, 4, 1, 1), (1, 1, 4, 1), (4, 1, 1, 1)]
    found = {(Split(pp, sp, tp), dp): tuple(FAMILIES) for pp, sp, tp, dp in two + more}
    return found | {(Split(2, 2, 2), 1): ("mixed",)}


CASES = sorted(
    (
        (split.pipeline * split.sequence * split.tensor * data, split, data, family)
        for (split, data), families in arrangements().items()
        for family in families
    ),
    key=lambda case: case[0],
)  # ranks of a number are started once


@cache
def expected(family: str, three: bool) -> tuple[Curve, dict[str, Tensor]]:
    return curve_alone(config_of(**settings_of(family, three)))


def settings_of(family: str, three: bool) -> dict[str, Any]:
    settings = FAMILIES[family]
    changes = settings.get("changes", {})
    attention = changes.get("attention", {}) | (THREE_HEADS if three else {})
    return settings | {"changes": changes | {"attention": attention}}


def name_of(split: Split, data: int) -> str:
    """As `pipeline 2 x tensor 2`."""
    sizes = {"pipeline": split.pipeline, "data": data, "sequence": split.sequence, "tensor": split.tensor}
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one process"


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    """Rows of the table, printed at the end."""
    rows: dict[str, dict[str, str]] = {}
    yield rows
    print("\n\n| ranks | " + " | ".join(FAMILIES) + " |\n|" + "---|" * (1 + len(FAMILIES)))
    for row, cells in rows.items():
        print(f"| {row} | " + " | ".join(cells.get(family, "") for family in FAMILIES) + " |")


@pytest.mark.parametrize(
    ("size", "split", "data", "family"), CASES, ids=[f"{name_of(s, d)}, {family}" for _, s, d, family in CASES]
)
def test_equals_one_process(
    ranks: Any, table: dict[str, dict[str, str]], size: int, split: Split, data: int, family: str
) -> None:
    three = split.sequence == 3
    wanted, gradients = expected(family, three)
    of_ranks = ranks(size).run(curve, timeout=600.0, split=split, settings=settings_of(family, three))
    curves = torch.tensor([found for found, _ in of_ranks], dtype=torch.float64)
    of_curve = float((curves / torch.tensor(wanted, dtype=torch.float64) - 1).abs().max())
    errors = worst([found for _, found in of_ranks], gradients)
    name, of_gradient = max(errors.items(), key=lambda item: item[1])
    table.setdefault(name_of(split, data), {})[family] = f"{of_curve:.0e} / {of_gradient:.0e}"
    assert of_curve <= TOLERANCE
    assert of_gradient <= TOLERANCE, name
