"""Rows of any documents, drawn by hypothesis, and what must hold for them."""

from collections.abc import Callable
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


def assert_equals_reference(
    op: Callable[..., Any], inputs: Inputs, row: list[int], *, impl: str, tolerance: float, **options: Any
) -> None:
    """`impl` gives the reference's results for one row of tokens at these positions.

    Differences count beside terms of order one and not beside their sum, which in a gradient of few tokens cancels.
    """
    layout = Layout(torch.tensor([row]))
    expected = evaluate(op, inputs, layout=layout, impl="reference")
    found = evaluate(op, inputs, layout=layout, impl=impl, **options)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        difference = (found[name].double() - exact.double()).norm()
        assert difference <= tolerance * (1 + exact.double().norm()), name
