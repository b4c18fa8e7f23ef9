"""gated_linear_attention as a loop over time, to be held against the equation."""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the last state [B, H, K, V]; arguments as in `ops.gated_linear_attention`."""
    dtype = accumulation_dtype(q, k, v, log_decay)
    if initial_state is None:
        initial_state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    state = initial_state.to(dtype)
    inputs = (q.to(dtype) * scale, k.to(dtype), v.to(dtype), log_decay.to(dtype).exp())
    outputs = []
    for t, (q_t, k_t, v_t, decay_t) in enumerate(zip(*(z.unbind(1) for z in inputs))):  # [B, H, K], v_t [B, H, V]
        if layout is not None:
            state = state.masked_fill(layout.starts[:, t, None, None, None], 0)
        state = decay_t[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append((q_t[..., None] * state).sum(-2))
    return torch.stack(outputs, dim=1).to(v.dtype), state
