"""rms_norm by flash-linear-attention's kernels."""

import torch
from torch import Tensor

MAX_BYTES = 65536
"""Of a row: its kernels hold one in registers."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool, gate: Tensor | None) -> Tensor:
    """y [..., D]; arguments as in `ops.rms_norm`. Raises ValueError for float64, and for rows of more than 64 KiB."""
    if x.dtype == torch.float64:
        raise ValueError(
            "rms_norm: x has dtype torch.float64; the implementation 'fla' computes in fp32: use 'chunked'"
        )
    limit = MAX_BYTES // x.element_size()
    if x.shape[-1] > limit:
        raise ValueError(
            f"rms_norm: x has D = {x.shape[-1]}; the implementation 'fla' takes at most {limit} in {x.dtype}: "
            f"use 'chunked'"
        )
    from fla.modules.norm import layernorm
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    factor = weight + 1 if one_plus_weight else weight
    if gate is None:
        return layernorm.rms_norm(x, factor, None, eps=eps)
    return rms_norm_gated(x, gate, factor, None, activation="swish", eps=eps)
