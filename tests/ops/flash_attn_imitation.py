"""What flash-attn documents of its functions, from torch's attention, one sequence after the other."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """o [B, T, H, K] of q [B, T, H, K], k and v [B, S, G, K]. Query i stands at key i + S - T: `causal` hides the keys
    behind that one, and a window (left, right), where it is not -1, those further off."""
    place = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
    distance = place[:, None] - torch.arange(k.shape[1], device=q.device)
    left, right = window_size
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= distance >= -right
    heads_first = (z.transpose(1, 2) for z in (q, k, v))
    return scaled_dot_product_attention(
        *heads_first, attn_mask=visible, scale=softmax_scale, enable_gqa=True
    ).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    """o [queries, H, K] of sequences that begin at cu_seqlens; keys of a sequence without queries get NaN gradients."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0
    assert lengths_q.min() >= 0
    assert lengths_q.max() <= max_seqlen_q
    assert max_seqlen_q > 1 or lengths_q.min() == 1
    assert lengths_k.min() >= 0
    assert lengths_k.max() <= max_seqlen_k
    seen = (lengths_q > 0).repeat_interleave(lengths_k)[:, None, None]
    k, v = NaNGradients.apply(k, seen), NaNGradients.apply(v, seen)
    sequences = zip(*(z.split(n.tolist()) for z, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))))
    return torch.cat([flash_attn_func(*(z[None] for z in s), **options)[0] for s in sequences if len(s[0])])


class NaNGradients(torch.autograd.Function):
    """The identity, with a gradient of NaN where not `seen`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(seen)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.saved_tensors[0], dz, torch.nan), None


def imitation() -> ModuleType:
    """A module to stand for the package."""
    module = ModuleType("flash_attn")
    vars(module).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    return module
