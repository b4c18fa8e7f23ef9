"""diagonal_gru by multiple shooting, with a hand-written linear backward."""

from typing import Any

from torch import Tensor

from ops.diagonal_cell.chunked import ChunkedForm
from ops.diagonal_gru.cell import GRU
from ops.layout import Layout

form = ChunkedForm(GRU)


def diagonal_gru(
    gates: Tensor, a: Tensor, layout: Layout | None, initial_state: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the last state [B, 1, D]; arguments and options as in `ops.diagonal_gru`."""
    return form(gates, a, layout, initial_state, **options)
