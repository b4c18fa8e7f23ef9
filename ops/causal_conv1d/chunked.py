"""causal_conv1d as W shifted products over the whole sequence, with a hand-written backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
    inputs = torch.cat([initial_state.to(dtype), x.to(dtype)], dim=1)  # [B, W-1+T, D]
    if bias is None:
        bias = weight.new_zeros(width)
    masks = None if layout is None else layout.derive(tap_masks, window, dtype)
    y = CausalConv1d.apply(inputs, weight.to(dtype), bias.to(dtype), masks)
    state = inputs[:, time:]
    if layout is not None:
        state = state * layout.derive(state_mask, window, dtype)
    return (silu(y) if activation == "silu" else y).to(x.dtype), state


def tap_masks(positions: Tensor, window: int, dtype: torch.dtype) -> list[Tensor]:
    """For each tap j of W, [B, T, 1]: 1 where the token j before belongs to the same document, else 0."""
    return [(positions >= j).to(dtype)[:, :, None] for j in range(window)]


def state_mask(positions: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """[B, W-1, 1]: 1 where one of the last W-1 inputs belongs to the row's last document, else 0."""
    age = torch.arange(window - 2, -1, -1, device=positions.device)
    return (age <= positions[:, -1:]).to(dtype)[:, :, None]


class CausalConv1d(torch.autograd.Function):
    """(inputs [B, W-1+T, D], weight [D, W], bias [D], W masks [B, T, 1] or None) -> y [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, masks: list[Tensor] | None) -> Tensor:
        coefficients = weight.flip(1).T.contiguous()  # [W, D], tap by tap
        taps = _taps(inputs, weight.shape[1])
        y = torch.addcmul(bias, taps[0], coefficients[0])
        product = torch.empty_like(y)
        for j in range(1, len(taps)):
            tap = taps[j] if masks is None else torch.mul(taps[j], masks[j], out=product)
            y.addcmul_(tap, coefficients[j])
        ctx.save_for_backward(inputs, coefficients)
        ctx.masks = masks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inputs, coefficients = ctx.saved_tensors
        dinputs, dcoefficients = torch.zeros_like(inputs), torch.empty_like(coefficients)
        taps, dtaps = _taps(inputs, len(coefficients)), _taps(dinputs, len(coefficients))
        product = torch.empty_like(taps[0])
        for j in range(len(taps)):
            dy_j = dy if ctx.masks is None or j == 0 else torch.mul(dy, ctx.masks[j], out=product)
            dtaps[j].addcmul_(dy_j, coefficients[j])
            torch.sum(torch.mul(dy_j, taps[j], out=product), (0, 1), out=dcoefficients[j])
        return dinputs, dcoefficients.flip(0).T, dy.sum((0, 1)), None


def _taps(inputs: Tensor, window: int) -> list[Tensor]:
    """Views [B, T, D] of inputs [B, W-1+T, D]: for tap j, the input j tokens before each output."""
    time = inputs.shape[1] - window + 1
    return [inputs[:, window - 1 - j :][:, :time] for j in range(window)]
