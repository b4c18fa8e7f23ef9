"""RMS normalisation as a module."""

import torch
from torch import Tensor, nn

from models.init import Initializer, constant
from ops import rms_norm


class RMSNorm(nn.Module):
    """y = x / rms(x) * (1 + weight), or * weight; statistics in fp32 (Zhang and Sennrich, 2019, equation 4). With a
    gate of x's shape, y * silu(gate).

    Args:
        width: D of the input `[..., D]`.
        one_plus_weight: store the weight as its distance from one, as Gemma does; weight decay then pulls towards one.

    Attributes:
        impl: the implementation of `rms_norm`; a model that chooses one sets it in all its norms.
    """

    def __init__(self, width: int, *, eps: float, one_plus_weight: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.one_plus_weight = one_plus_weight
        self.impl = "auto"

    def initializers(self) -> dict[str, Initializer]:
        return {"weight": constant(0.0 if self.one_plus_weight else 1.0)}

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, one_plus_weight=self.one_plus_weight, gate=gate, impl=self.impl)
