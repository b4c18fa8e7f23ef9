"""rotary as its formula, differentiated by autograd; compilers fuse it into one pass."""

import torch
from torch import Tensor

from ops.precision import accumulation_dtype


def rotary(x: Tensor, positions: Tensor, theta: float, rotary_dim: int) -> Tensor:
    """[B, T, H, K]; arguments as in `ops.rotary`."""
    dtype = accumulation_dtype(x)
    angle = angles(positions, theta, rotary_dim, dtype).unsqueeze(2)  # [B, T, 1, rotary_dim/2]
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split([rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)


def angles(positions: Tensor, theta: float, rotary_dim: int, dtype: torch.dtype) -> Tensor:
    """In radians, [*positions.shape, rotary_dim/2]."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=dtype) / rotary_dim
    return positions.unsqueeze(-1).to(dtype) * (1.0 / theta**exponent)
