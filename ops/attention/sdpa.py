"""attention through torch's scaled_dot_product_attention, whose fused kernels hold the scores in tiles only.

What is held whole is the mask, where causality alone does not do: T x (S+T) booleans a row, shared by all heads; on a
GPU the kernel turns them into as many numbers of the dtype of q.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ops.attention.inputs import State, prepend
from ops.layout import Layout


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Layout | None, initial_state: State | None
) -> tuple[Tensor, State]:
    """o [B, T, H, K] and the keys and values [B, S+T, G, K]; arguments as in `ops.attention`."""
    state = prepend(initial_state, k, v)
    return masked_attention(q, *state, scale, layout), state


def masked_attention(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, layout: Layout | None, window: int | None = None
) -> Tensor:
    """o [B, T, H, K] of queries q [B, T, H, K] at the last T of the keys [B, S+T, G, K], with one mask of T x (S+T)."""
    batch, time = q.shape[:2]
    num_previous = keys.shape[1] - time
    if layout is not None:
        return sdpa(q, keys, values, scale, layout.derive(visible_keys, num_previous, window))
    if window is None and num_previous == 0:
        return sdpa(q, keys, values, scale, None)
    positions = torch.arange(num_previous, num_previous + time, device=q.device).expand(batch, time)
    return sdpa(q, keys, values, scale, visible_keys(positions, num_previous, window))


def visible_keys(positions: Tensor, num_previous: int, window: int | None) -> Tensor:
    """bool [B, 1, T, S+T]: whether query t sees key s, for S = `num_previous` keys before the first query."""
    time = positions.shape[1]
    t = torch.arange(time, device=positions.device)
    s = torch.arange(-num_previous, time, device=positions.device)
    distance = t[:, None] - s
    reach = positions if window is None else positions.clamp(max=window - 1)
    return ((distance >= 0) & (distance <= reach[:, :, None])).unsqueeze(1)


def sdpa(q: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """torch's attention on time-major heads: q [B, T, H, K], keys and values [B, S, G, K]; causal without a mask."""
    q, keys, values = (z.transpose(1, 2) for z in (q, keys, values))
    gqa = q.shape[1] != keys.shape[1]
    if gqa and q.device.type == "cuda":
        # Flash attention takes neither a mask nor fp32, the memory-efficient kernel no groups: for both together torch
        # would hold the score matrix.
        keys, values = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (keys, values))
        gqa = False
    o = scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
    )
    return o.transpose(1, 2).to(q.dtype)  # autocast returns its own dtype
