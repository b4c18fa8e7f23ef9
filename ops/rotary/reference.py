"""rotary as its formula, differentiated by autograd; compilers fuse it into one pass."""

import torch
from torch import Tensor

from ops.precision import accumulation_dtype


def rotary(x: Tensor, positions: Tensor, theta: float, rotary_dim: int) -> Tensor:
    """[B, T, H, K]; arguments as in `ops.rotary`."""
    dtype = accumulation_dtype(x)
    exponent = torch.arange(0, rotary_dim, 2, device=x.device, dtype=dtype) / rotary_dim
    angle = positions[:, :, None, None].to(dtype) * (1.0 / theta**exponent)  # [B, T, 1, rotary_dim/2]
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split([rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)
