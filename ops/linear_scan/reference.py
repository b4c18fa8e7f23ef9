"""linear_scan as a loop over time, to be held against the equation."""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype


def linear_scan(
    x: Tensor, log_decay: Tensor, layout: Layout | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last state [B, D]; arguments as in `ops.linear_scan`."""
    dtype = accumulation_dtype(x, log_decay)
    decay = log_decay.to(dtype).exp()
    state = torch.zeros_like(x[:, 0], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t, (x_t, decay_t) in enumerate(zip(x.to(dtype).unbind(1), decay.unbind(1))):
        if layout is not None:
            state = state.masked_fill(layout.starts[:, t, None], 0)
        state = decay_t * state + x_t
        outputs.append(state)
    return torch.stack(outputs, dim=1).to(x.dtype), state
