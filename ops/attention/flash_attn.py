"""attention and local_attention through the package flash-attn (2.x), documents as sequences of different lengths.

A row's documents become sequences of one flat batch. Causality counts from the ends of a sequence's queries and keys,
so that a document which continues from before the call holds the visible part of the state in front of its keys; the
rest of the state, which nothing sees, is a sequence without queries.

How many documents there are is a fact of the values: a layout waits for the device once, when its borders are found,
and no layer does. Where even that is too much, 'flex' does not wait.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.attention.inputs import State, prepend
from ops.layout import Layout
from ops.precision import product_dtype, without_autocast

DTYPES = (torch.bfloat16, torch.float16)
MAX_WIDTH = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: State | None,
    window: int | None = None,
) -> tuple[Tensor, State]:
    """o [B, T, H, K] and the keys and values [B, S+T, G, K]; arguments as in `ops.attention`, `ops.local_attention`."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    dtype = product_dtype(q, k)
    _check(q, dtype, "attention" if window is None else "local_attention")
    keys, values = state = prepend(initial_state, k, v)
    num_keys, num_previous = keys.shape[1], keys.shape[1] - q.shape[1]
    reach = (-1, -1) if window is None else (window - 1, 0)  # tokens before and after a query's own, -1 for all
    options = {"softmax_scale": scale, "causal": True, "window_size": reach}
    with without_autocast(q):
        if layout is None:
            o = flash_attn_func(*(z.to(dtype) for z in (q, keys, values)), **options)
            return o.to(q.dtype), state
        borders = layout.derive(find_borders, num_previous)
        if num_previous:  # what no query sees gets a gradient of 0, whatever the kernel leaves in its place
            keys, values = (torch.where(borders.in_use[:, :, None, None], z, 0) for z in (keys, values))
        o = flash_attn_varlen_func(
            *(z.to(dtype).flatten(0, 1) for z in (q, keys, values)),
            cu_seqlens_q=borders.queries,
            cu_seqlens_k=borders.keys,
            max_seqlen_q=max(2, q.shape[1]),  # of 1, the package takes it that no sequence is without a query
            max_seqlen_k=num_keys,
            **options,
        )
    return o.view(q.shape).to(q.dtype), state


class Borders(NamedTuple):
    """Where the sequences of a flat batch begin, and the end of the last one, int32 [sequences + 1] each; and which
    keys belong to a sequence with queries, bool [B, S+T]."""

    queries: Tensor
    keys: Tensor
    in_use: Tensor


def find_borders(positions: Tensor, num_previous: int) -> Borders:
    """The sequences of rows of T queries and S+T keys, for S = `num_previous` keys before the first query."""
    batch, time = positions.shape
    num_keys = num_previous + time
    unseen = num_previous - positions[:, 0].clamp(max=num_previous)  # [B] keys of the state before the first document
    starts = positions == 0
    starts[:, 0] = True
    if num_previous:  # in front of each row's first document, the sequence of the keys that it does not see
        starts = torch.cat([torch.ones_like(starts[:, :1]), starts], dim=1)
    row, column = starts.nonzero().unbind(1)
    if num_previous:
        t = (column - 1).clamp(min=0)
        key = torch.where(column == 0, 0, torch.where(column == 1, unseen[row], num_previous + t))
    else:
        t = key = column
    in_use = torch.arange(num_keys, device=positions.device) >= unseen[:, None]
    return Borders(_closed(row * time + t, batch * time), _closed(row * num_keys + key, batch * num_keys), in_use)


def _closed(starts: Tensor, end: int) -> Tensor:
    return torch.cat([starts, starts.new_full((1,), end)]).to(torch.int32)


def _check(q: Tensor, dtype: torch.dtype, op: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{op}: the inputs are {dtype}; 'flash_attn' needs bf16 or fp16; choose 'flex' or 'chunked'")
    if q.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"{op}: q has {q.shape[-1]} features a head; 'flash_attn' needs {MAX_WIDTH} at most; choose 'chunked'"
        )
