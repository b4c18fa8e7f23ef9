"""Rotary position embedding."""

import torch
from torch import Tensor

from ops.check import check_dim, check_floating, check_shape
from ops.precision import accumulation_dtype


def rotary(x: Tensor, positions: Tensor, *, theta: float = 1e4, rotary_dim: int | None = None) -> Tensor:
    """Rotate features i and i + rotary_dim/2 of every head by positions * theta^(-2i/rotary_dim) radians (RoPE,
    arXiv 2104.09864, in the half-split order of GPT-NeoX and Gemma).

    x:           [B, T, H, K]
    positions:   int64 [B, T]
    theta:       base of the wavelengths
    rotary_dim:  how many leading features are rotated, even, <= K; all by default

    Angles and rotation are fp32 (float64 for float64 x); returns x's shape and dtype.
    Raises ValueError for wrong shapes or dtypes.
    """
    check_dim("rotary", "x", x, "B T H K")
    check_shape("rotary", "positions", positions, "B T", *x.shape[:2])
    check_floating("rotary", x=x)
    rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= x.shape[-1]:
        raise ValueError(f"rotary: rotary_dim is {rotary_dim}; must be even, > 0 and <= K = {x.shape[-1]}")
    dtype = accumulation_dtype(x)
    exponent = torch.arange(0, rotary_dim, 2, device=x.device, dtype=dtype) / rotary_dim
    angle = positions[:, :, None, None].to(dtype) * (1.0 / theta**exponent)  # [B, T, 1, rotary_dim/2]
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split([rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)
