"""Root mean square norm, plain and gated."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from ops.check import check_floating, check_shape
from ops.precision import accumulation_dtype


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, one_plus_weight: bool = False, gate: Tensor | None = None
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); with a gate, y * silu(gate).

    x:       [..., D]
    weight:  [D]; with `one_plus_weight` (Gemma) the factor is 1 + weight
    gate:    as x

    Computed in fp32 (float64 for float64 x); returns x's shape and dtype. Raises ValueError for wrong shapes or dtypes.
    """
    if x.dim() == 0:
        raise ValueError("rms_norm: x is a scalar; must be [..., D]")
    check_shape("rms_norm", "weight", weight, "D", x.shape[-1])
    check_shape("rms_norm", "gate", gate, "... D", *x.shape)
    check_floating("rms_norm", x=x, weight=weight, gate=gate)
    dtype = accumulation_dtype(x)
    y = RMSNorm.apply(x, weight.to(dtype) + 1 if one_plus_weight else weight.to(dtype), eps, dtype)
    if gate is not None:
        y = y * silu(gate.to(dtype))
    return y.to(x.dtype)


class RMSNorm(torch.autograd.Function):
    """(x [..., D], factor [D], eps, dtype of computation) -> y [..., D] in that dtype.

    Autograd would keep three tensors of x's size; this keeps x and one number a row, and takes fewer passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = x.to(dtype).square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, factor, scale)
        return (x * scale).mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, factor, scale = ctx.saved_tensors
        normed = x * scale
        dnormed = dy * factor
        product = dnormed * normed
        mean = product.mean(-1, keepdim=True)
        dfactor = torch.mul(dy, normed, out=product).reshape(-1, x.shape[-1]).sum(0)
        dx = dnormed.addcmul_(normed, mean, value=-1).mul_(scale)
        return dx.to(x.dtype), dfactor, None, None
