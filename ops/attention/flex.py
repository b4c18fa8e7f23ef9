"""attention and local_attention through torch's FlexAttention, which skips the blocks of keys that no query sees.

The mask is one function of two tensors, the first and the last visible key of each query, so that documents, windows
and states all run the same compiled kernel; what it visits is found once per layout, on the device and without waiting
for it, from the extremes of those two over each block: no tensor of T x (S+T) exists.

The kernel is compiled for the sizes of the first call, and once more, for any, when a size first changes; another
packing, window or first position compiles nothing. Torch compiles sizes of 1 apart (rows, queries, blocks), so that
training, validation and generation in one process need about ten kernels, however many lengths they meet.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from ops.attention.inputs import State, prepend
from ops.layout import Layout
from ops.precision import product_dtype, without_autocast

# Queries and keys of a block: the granularity at which FlexAttention skips.
BLOCK = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = range(16, 257)
# Torch's own limit, 8 kernels a function, is for functions that compile without end.
MAX_KERNELS = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: State | None,
    window: int | None = None,
) -> tuple[Tensor, State]:
    """o [B, T, H, K] and the keys and values [B, S+T, G, K]; arguments as in `ops.attention`, `ops.local_attention`.

    Without a layout the mask is formed in every call.
    """
    op = "attention" if window is None else "local_attention"
    dtype = product_dtype(q, k)
    if dtype not in DTYPES:
        raise ValueError(f"{op}: the inputs are {dtype}; 'flex' needs fp32, bf16 or fp16; choose 'chunked'")
    if q.shape[-1] not in WIDTHS:
        raise ValueError(f"{op}: q has {q.shape[-1]} features a head; 'flex' needs 16 to 256; choose 'chunked'")
    keys, values = state = prepend(initial_state, k, v)
    batch, time = q.shape[:2]
    num_previous = keys.shape[1] - time
    if layout is None:
        positions = torch.arange(num_previous, num_previous + time, device=q.device).expand(batch, time)
        mask = block_mask(positions, num_previous, window)
    else:
        mask = layout.derive(block_mask, num_previous, window)
    with without_autocast(q):
        heads_first = (z.to(dtype).transpose(1, 2) for z in (q, keys, values))
        o = _kernel()(*heads_first, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return o.transpose(1, 2).to(q.dtype), state


def block_mask(positions: Tensor, num_previous: int, window: int | None) -> BlockMask:
    """The mask of T queries at the last of S+T keys, for S = `num_previous` keys before the first query."""
    time = positions.shape[1]
    newest = torch.arange(num_previous, num_previous + time, dtype=torch.int32, device=positions.device)
    reach = positions if window is None else positions.clamp(max=window - 1)
    oldest = (newest - reach).clamp(min=0).to(torch.int32)

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s >= oldest[b, t]) & (s <= newest[t])

    some, whole = visible_blocks(oldest, newest, num_previous + time)
    partial = some & ~whole
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(whole), BLOCK, mask_mod=visible, seq_lengths=(time, num_previous + time)
    )


def visible_blocks(oldest: Tensor, newest: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """bool [B, blocks of queries, blocks of keys]: whether a query of the block may see a key of the block, and whether
    all its queries see all its keys; for the keys oldest [B, T] to newest [T] that each query sees.

    What the queries of a block see is one stretch: the next query's begins no later than one behind this one's end.
    """
    time = len(newest)
    tail = -time % BLOCK
    blocks = (-1, BLOCK)
    first = pad(oldest, (0, tail), value=num_keys).unflatten(1, blocks)
    last = pad(newest, (0, tail), value=-1).unflatten(0, blocks)
    start = torch.arange(0, num_keys, BLOCK, device=newest.device)
    end = (start + BLOCK - 1)[None, None, :]
    some = (first.amin(2)[:, :, None] <= end) & (last.amax(1)[:, None] >= start)
    # A block that the last queries do not fill has a query that begins behind all keys and ends before them.
    whole = (first.amax(2)[:, :, None] <= start) & (last.amin(1)[:, None] >= end)
    return some, whole


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries visits, int32 [B, 1, n], and which, in order, [B, 1, n, m]."""
    count = blocks.sum(2, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=2, descending=True, stable=True).to(torch.int32)
    return count.unsqueeze(1), order.unsqueeze(1)


def _kernel() -> Callable[..., Tensor]:
    if torch.compiler.is_compiling():
        return flex_attention
    return compiled()


@cache
def compiled(backend: Any = "inductor") -> Callable[..., Tensor]:
    """flex_attention compiled to one kernel; beyond MAX_KERNELS of them it raises."""
    # Without fullgraph torch would go on, beyond the limit, with the score matrix in memory.
    function: Callable[..., Any] = torch.compile(flex_attention, fullgraph=True, backend=backend)

    def kernel(*tensors: Tensor, **options: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=MAX_KERNELS):
            return function(*tensors, **options)

    return kernel
