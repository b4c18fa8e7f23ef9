"""causal_conv1d as a loop over time."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ops.layout import Layout
from ops.precision import accumulation_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layout: Layout | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last W-1 inputs [B, W-1, D]; arguments as in `ops.causal_conv1d`."""
    dtype = accumulation_dtype(x)
    batch, time, width = x.shape
    window = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, window - 1, width)
    state = initial_state.to(dtype)
    outputs = []
    for t in range(time):
        if layout is not None:
            age = torch.arange(window - 1, 0, -1, device=x.device)  # of each held input, in tokens before t
            state = state.masked_fill((age > layout.positions[:, t, None])[:, :, None], 0)
        inputs = torch.cat([state, x[:, t : t + 1].to(dtype)], dim=1)  # [B, W, D]
        y = (inputs * weight.to(dtype).T).sum(1)
        outputs.append(y if bias is None else y + bias.to(dtype))
        state = inputs[:, 1:]
    y = torch.stack(outputs, dim=1)
    return (silu(y) if activation == "silu" else y).to(x.dtype), state
