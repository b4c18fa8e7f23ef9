"""rotary by flash-linear-attention's kernel, which looks angles up: here each token of the rows laid end to end has its
own line of the table, so that documents and first positions need nothing else."""

import torch
from torch import Tensor

from ops.rotary.reference import angles

MAX_FEATURES = 256


def rotary(x: Tensor, positions: Tensor, theta: float, rotary_dim: int) -> Tensor:
    """[B, T, H, K]; arguments as in `ops.rotary`. Raises ValueError for float64 and for K > 256.

    The kernel takes tables of x's dtype and would round angles to bf16, so that x is widened to fp32 before it.
    """
    from fla.modules import rotary as theirs

    if x.dtype == torch.float64:
        raise ValueError(
            "rotary: x has dtype torch.float64; the implementation 'fla' computes in fp32: use 'reference'"
        )
    if x.shape[-1] > MAX_FEATURES:
        raise ValueError(
            f"rotary: x has K = {x.shape[-1]} features; the implementation 'fla' takes at most {MAX_FEATURES}: use "
            f"'reference'"
        )
    angle = angles(positions.flatten(), theta, rotary_dim, torch.float32)
    flat = x.flatten(0, 1).unsqueeze(0).float()
    return theirs.rotary_embedding(flat, angle.cos(), angle.sin()).view(x.shape).to(x.dtype)
