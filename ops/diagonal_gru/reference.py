"""diagonal_gru as a loop over time, to be held against equation 3.1 of ParaRNN."""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype


def diagonal_gru(
    gates: Tensor, a: Tensor, layout: Layout | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the last state [B, 1, D]; arguments as in `ops.diagonal_gru`."""
    dtype = accumulation_dtype(gates, a)
    a_z, a_r, a_c = a.to(dtype)  # [D] each
    h = gates.new_zeros(gates.shape[0], gates.shape[3], dtype=dtype)
    if initial_state is not None:
        h = initial_state[:, 0].to(dtype)
    outputs = []
    for t, gates_t in enumerate(gates.to(dtype).unbind(1)):
        if layout is not None:
            h = h.masked_fill(layout.starts[:, t, None], 0)
        gate_z, gate_r, gate_c = gates_t.unbind(1)  # [B, D] each
        z = torch.sigmoid(a_z * h + gate_z)
        r = torch.sigmoid(a_r * h + gate_r)
        c = torch.tanh(a_c * (h * r) + gate_c)
        h = (1 - z) * h + z * c
        outputs.append(h)
    return torch.stack(outputs, dim=1).to(gates.dtype), h.unsqueeze(1)
