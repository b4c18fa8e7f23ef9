"""diagonal_lstm as a loop over time, to be held against equation 3.1 of ParaRNN."""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype


def diagonal_lstm(
    gates: Tensor, a: Tensor, c: Tensor, layout: Layout | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the last state [B, 2, D]; arguments as in `ops.diagonal_lstm`."""
    dtype = accumulation_dtype(gates, a, c)
    a_f, a_o, a_z = a.to(dtype)  # [D] each
    c_f, c_o = c.to(dtype)
    state = gates.new_zeros(gates.shape[0], 2, gates.shape[3], dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t, gates_t in enumerate(gates.to(dtype).unbind(1)):
        if layout is not None:
            state = state.masked_fill(layout.starts[:, t, None, None], 0)
        cell, h = state.unbind(1)  # [B, D]
        gate_f, gate_o, gate_z = gates_t.unbind(1)
        f = torch.sigmoid(a_f * h + gate_f + c_f * cell)
        z = torch.tanh(a_z * h + gate_z)
        cell = f * cell + (1 - f) * z
        o = torch.sigmoid(a_o * h + gate_o + c_o * cell)
        h = o * torch.tanh(cell)
        state = torch.stack([cell, h], dim=1)
        outputs.append(h)
    return torch.stack(outputs, dim=1).to(gates.dtype), state
