"""Rows of any documents, drawn by hypothesis, and what must hold for them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

from ops import Layout
from tests.ops.compare import Inputs, evaluate


def positions(longest: int, *, latest: int = 3) -> st.SearchStrategy[list[int]]:
    """Of a row of up to `longest` tokens, whose first one is up to `latest` tokens into its document."""
    starts = st.lists(st.booleans(), max_size=longest - 1)
    return st.builds(_positions, first=st.integers(0, latest), starts=starts)


def _positions(first: int, starts: list[bool]) -> list[int]:
    row = [first]
    for start in starts:
        row.append(0 if start else row[-1] + 1)
    return row


# What rounds a result to float64, and how many such roundings, of the inputs or of the result, a form may be off. Right
# ones are off by 1 to 3 of them, and by 12 in a gradient of few numbers; the least of mistakes is off by millions.
ROUNDING = 2.0**-53
ROUNDINGS = 128
NUDGE = 1e-8


def assert_equals_reference(
    op: Callable[..., Any], inputs: Inputs, row: list[int], *, impl: str, **options: Any
) -> None:
    """`impl` gives the reference's results in float64 for one row of tokens at these positions.

    What may differ is what roundings of the inputs would change in the reference's own results, where sums cancel too:
    measured, twice, by inputs that are changed at random and by more than roundings.
    """
    layout = Layout(torch.tensor([row]))
    reference = partial(evaluate, op, layout=layout, impl="reference")
    expected = reference(inputs)
    nudged = [reference({name: z * (1 + NUDGE * torch.randn_like(z)) for name, z in inputs.items()}) for _ in range(2)]
    found = evaluate(op, inputs, layout=layout, impl=impl, **options)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        change = max((results[name] - exact).norm() for results in nudged) / NUDGE
        allowed = ROUNDINGS * ROUNDING * max(change, exact.norm())
        difference = (found[name] - exact).norm()
        assert difference <= allowed, f"{name}: off by {difference:.1e}, roundings explain {allowed:.1e}"
