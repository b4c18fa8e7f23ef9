"""rms_norm in torch with a hand-written backward.

It stays an autograd function that compilers look into, and no opaque op: on a GPU they fuse its passes with what
stands around it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from ops.precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool, gate: Tensor | None) -> Tensor:
    """y [..., D]; arguments as in `ops.rms_norm`."""
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
