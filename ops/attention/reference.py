"""Attention from its definition, with the whole score matrix."""

import torch
from torch import Tensor

from ops.attention.inputs import State, prepend
from ops.layout import Layout
from ops.precision import accumulation_dtype


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: State | None,
    window: int | None = None,
) -> tuple[Tensor, State]:
    """o [B, T, H, K] and the keys and values [B, S+T, G, K]; arguments as in `ops.attention`, `ops.local_attention`."""
    dtype = accumulation_dtype(q)
    state = prepend(initial_state, k, v)
    batch, time, heads, _ = q.shape
    keys, values = (z.to(dtype).repeat_interleave(heads // k.shape[2], dim=2) for z in state)  # [B, S+T, H, K]
    num_previous = keys.shape[1] - time
    scores = scale * torch.einsum("bthk,bshk->bhts", q.to(dtype), keys)
    visible = torch.empty(batch, time, num_previous + time, dtype=torch.bool, device=q.device)
    for t in range(time):
        distance = num_previous + t - torch.arange(num_previous + time, device=q.device)
        visible[:, t] = distance >= 0
        if window is not None:
            visible[:, t] &= distance < window
        if layout is not None:
            visible[:, t] &= distance <= layout.positions[:, t, None]
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, values).to(q.dtype), state
