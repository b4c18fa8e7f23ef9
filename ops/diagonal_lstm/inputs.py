"""The checks that diagonal_lstm and its summary share."""

from torch import Tensor

from ops.check import check_dim, check_floating, check_layout, check_shape
from ops.layout import Layout


def check_inputs(
    op: str, gates: Tensor, a: Tensor, c: Tensor, layout: Layout | None, initial_state: Tensor | None
) -> None:
    """Raise ValueError unless shapes and dtypes are those of `ops.diagonal_lstm`."""
    check_dim(op, "gates", gates, "B T 3 D")
    batch, time, _, width = gates.shape
    check_shape(op, "gates", gates, "B T 3 D", batch, time, 3, width)
    check_shape(op, "a", a, "3 D", 3, width)
    check_shape(op, "c", c, "2 D", 2, width)
    check_shape(op, "initial_state", initial_state, "B 2 D", batch, 2, width)
    check_floating(op, gates=gates, a=a, c=c, initial_state=initial_state)
    check_layout(op, layout, batch, time)
