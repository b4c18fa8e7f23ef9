"""diagonal_lstm by multiple shooting, with a hand-written linear backward."""

from typing import Any

import torch
from torch import Tensor

from ops.diagonal_cell.chunked import ChunkedForm
from ops.diagonal_lstm.cell import LSTM
from ops.layout import Layout

form = ChunkedForm(LSTM)


def diagonal_lstm(
    gates: Tensor, a: Tensor, c: Tensor, layout: Layout | None, initial_state: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the last state [B, 2, D]; arguments and options as in `ops.diagonal_lstm`."""
    return form(gates, torch.cat([a, c]), layout, initial_state, **options)
