"""Rotary position embedding."""

from typing import Any

from torch import Tensor

from ops.check import check_dim, check_floating, check_shape
from ops.impl import resolve_impl
from ops.rotary import reference


def rotary(
    x: Tensor, positions: Tensor, *, theta: float = 1e4, rotary_dim: int | None = None, impl: str = "auto"
) -> Tensor:
    """Rotate features i and i + rotary_dim/2 of every head by positions * theta^(-2i/rotary_dim) radians (RoPE,
    arXiv 2104.09864, in the half-split order of GPT-NeoX and Gemma).

    x:           [B, T, H, K]
    positions:   int64 [B, T]
    theta:       base of the wavelengths
    rotary_dim:  how many leading features are rotated, even, <= K; all by default

    Angles and rotation are fp32 (float64 for float64 x); returns x's shape and dtype.
    Raises ValueError for wrong shapes or dtypes and for an implementation that cannot run here.
    """
    check_dim("rotary", "x", x, "B T H K")
    check_shape("rotary", "positions", positions, "B T", *x.shape[:2])
    check_floating("rotary", x=x)
    rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= x.shape[-1]:
        raise ValueError(f"rotary: rotary_dim is {rotary_dim}; must be even, > 0 and <= K = {x.shape[-1]}")
    chosen = resolve_impl("rotary", impl, x.device.type)
    module: Any = reference
    if chosen == "triton":
        from ops.rotary import triton as module
    elif chosen == "fla":
        from ops.rotary import fla as module
    return module.rotary(x, positions, theta, rotary_dim)
