"""gated_linear_attention with all chunks of a tile side by side, and a hand-written backward.

Inside a chunk the pairs (query t, key s < t) are found by halving: for blocks of 1, 2, 4, ... tokens the queries carry
the decays from the start of their block to t, the keys those after s to the end of theirs, and the queries of a right
half meet the keys of the left half beside it in one matrix product. Then two neighbours merge: the right queries
take on the total decay of the left half, the left keys that of the right. After the last merge the same queries read
the state carried into the chunk, and the same keys feed the one carried out. The pair (t, t) stands apart.

Each decay thus enters as a factor <= 1 of an interval's own product and nothing is ever divided or subtracted: decays
of 0 and of 1 are as good as any. A document's first token is a decay of exactly 0, which cuts every path across it,
forward and backward, and leaves the precision of all others alone.

The backward retraces the merges from the last to the first. It recomputes a tile from the state at its start.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.gated_linear_attention.tile import Tile
from ops.layout import Layout
from ops.precision import accumulation_dtype, without_autocast

MAX_CHUNK = 32
# Numbers a tile's largest tensor may hold: on a CPU a tile stays in the cache, elsewhere it fills the machine.
TILE_ELEMENTS = {"cpu": 2**18}
LARGE_TILE = 2**24


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the last state [B, H, K, V]; arguments as in `ops.gated_linear_attention`."""
    dtype = accumulation_dtype(q, k, v, log_decay)
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1], dtype=dtype)
    starts = None if layout is None else layout.starts
    o, state, _ = forward(q, k, v, log_decay, initial_state.to(dtype), starts, scale)
    return o, state


@torch.library.custom_op("rondo::gated_linear_attention_chunked_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last state, and the state at the start of each tile [tiles, B * H, K, V]; `initial_state` comes in the
    dtype of computation, starts is bool [B, T]."""
    tiles = _tiles(q, v)
    o = v.new_empty(v.shape)
    state = initial_state.flatten(0, 1)
    states = torch.empty(len(tiles), *state.shape, dtype=state.dtype, device=state.device)
    with without_autocast(q):
        for tile, before in zip(tiles, states):
            before.copy_(state)
            chunks = _load((q, k, v, log_decay), starts, scale, tile, state.dtype)
            merged = _merge(*chunks)
            entries, state = _carry(merged.k_out.mT @ chunks.v, merged.total, before)
            tile.store(torch.baddbmm(merged.scores @ chunks.v, merged.q_in, entries), o)
    return o, state.view(initial_state.shape), states


@torch.library.custom_op("rondo::gated_linear_attention_chunked_backward", mutates_args=())
def backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial state, of those of o and the last state."""
    inputs = (q, k, v, log_decay)
    shape, dstate = dstate.shape, dstate.flatten(0, 1)
    gradients = [z.new_empty(z.shape) for z in inputs]
    with without_autocast(q):
        for tile, state in zip(reversed(_tiles(q, v)), states.flip(0)):
            chunks = _load(inputs, starts, scale, tile, dstate.dtype)
            *parts, dstate = _tile_backward(chunks, state, tile.load(do, dstate.dtype), dstate)
            parts[0].mul_(scale)
            for part, gradient in zip(parts, gradients):
                tile.store(part, gradient)
    dq, dk, dv, dlog_decay = gradients
    return dq, dk, dv, dlog_decay, dstate.view(shape)


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor, starts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    state = initial_state.new_empty(initial_state.shape)
    return v.new_empty(v.shape), state, state.new_empty(len(_tiles(q, v)), state[..., 0, 0].numel(), *state.shape[2:])


@backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(z.new_empty(z.shape) for z in (q, k, v, log_decay, dstate))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, _, starts, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # or the states would get a gradient of zeros as large as they are
    ctx.save_for_backward(q, k, v, log_decay, output[2], starts)
    ctx.state_shape = output[1].shape


def _autograd(ctx: Any, do: Tensor | None, dstate: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, states, starts = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dstate = states.new_zeros(ctx.state_shape) if dstate is None else dstate
    return *backward(do, dstate, q, k, v, log_decay, states, starts, ctx.scale), None, None


forward.register_autograd(_autograd, setup_context=_setup_context)


def _tiles(q: Tensor, v: Tensor) -> list[Tile]:
    batch, time, heads, keys = q.shape
    limit = TILE_ELEMENTS.get(q.device.type, LARGE_TILE)
    most = max(1, limit // (batch * heads * MAX_CHUNK * max(keys, v.shape[-1])))
    tiles = []
    start, chunks = 0, time // MAX_CHUNK
    while chunks:
        here = min(chunks, most)
        tiles.append(Tile(start, start + here * MAX_CHUNK, here, MAX_CHUNK))
        start, chunks = tiles[-1].stop, chunks - here
    if start < time:
        tiles.append(Tile(start, time, 1, 1 << (time - start - 1).bit_length()))
    return tiles


class Chunks(NamedTuple):
    """A tile's inputs, M = chunks * B * H."""

    q: Tensor  # [M, C, K], scaled
    k: Tensor  # [M, C, K]
    v: Tensor  # [M, C, V]
    decay: Tensor  # [M, C, K], in 0 to 1


def _load(
    inputs: tuple[Tensor, ...] | list[Tensor], starts: Tensor | None, scale: float, tile: Tile, dtype: torch.dtype
) -> Chunks:
    q, k, v, decay = (tile.load(z, dtype) for z in inputs)
    decay.exp_()
    if starts is not None:
        heads = inputs[0].shape[2]
        first = tile.load(starts[:, :, None, None], torch.bool)  # [chunks * B, C, 1]
        decay.unflatten(0, (-1, heads)).masked_fill_(first[:, None], 0)
    return Chunks(q.mul_(scale), k, v, decay)


class Level(NamedTuple):
    """One merge of the blocks of b tokens, two by two."""

    right: Tensor  # [M, C/2b, b, K], queries of right halves with the decays since the half's start
    left: Tensor  # [M, C/2b, b, K], keys of left halves with the decays until the half's end
    before: Tensor  # [M, C/2b, 1, K], total decay of left halves
    after: Tensor  # [M, C/2b, 1, K], total decay of right halves


class Merged(NamedTuple):
    """Chunks whose blocks are all merged."""

    scores: Tensor  # [M, C, C], lower triangular
    q_in: Tensor  # [M, C, K], queries as they see the state before the chunk
    k_out: Tensor  # [M, C, K], keys as they feed the state after the chunk
    total: Tensor  # [M, K, 1], decay of the whole chunk
    levels: list[Level]


def _merge(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Merged:
    size = q.shape[1]
    q_in, k_out, total = q * decay, k.clone(), decay
    scores = torch.diag_embed((q * k).sum(-1))
    levels = []
    block = 1
    while block < size:
        rights, lefts = _halves(q_in, block)[:, :, 1], _halves(k_out, block)[:, :, 0]
        copies = (z.clone(memory_format=torch.contiguous_format) for z in (rights, lefts))
        level = Level(*copies, *_halves(total, 1).unbind(2))
        product = level.right.flatten(1, 2) @ level.left.flatten(1, 2).mT  # [M, C/2, C/2]
        quarter = _quarter(scores, block)
        quarter.addcmul_(product.view(quarter.shape), _own_block(quarter))
        torch.mul(level.right, level.before, out=rights)
        torch.mul(level.left, level.after, out=lefts)
        total = (level.before * level.after).flatten(1, 2)
        levels.append(level)
        block *= 2
    return Merged(scores, q_in, k_out, total.mT, levels)


def _halves(z: Tensor, block: int) -> Tensor:
    """[M, n, K] -> [M, n / 2b, half, b, K], for b = `block`."""
    return z.view(z.shape[0], -1, 2, block, z.shape[-1])


def _quarter(scores: Tensor, block: int) -> Tensor:
    """The view [M, C/2b, b, C/2b, b] of [M, C, C] where queries lie in right halves and keys in left ones."""
    num, size, _ = scores.shape
    blocks = size // (2 * block)
    return scores.view(num, blocks, 2, block, blocks, 2, block)[:, :, 1, :, :, 0]


def _own_block(quarter: Tensor) -> Tensor:
    """1 where query and key of a `_quarter` lie in neighbouring halves, 0 elsewhere: [C/2b, 1, C/2b, 1]."""
    return torch.eye(quarter.shape[1], dtype=quarter.dtype, device=quarter.device)[:, None, :, None]


def _carry(updates: Tensor, total: Tensor, state: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """What each chunk of a tile starts from, [M, K, V], and what the last one leaves, [B * H, K, V].

    updates [M, K, V] and total [M, K, 1]: a chunk turns `state` [B * H, K, V] into total * state + update. In reverse
    the last chunk goes first.
    """
    shape = (-1, *state.shape)
    entries = torch.empty_like(updates)
    steps = list(zip(entries.view(shape), total.unflatten(0, shape[:2]), updates.view(shape)))
    if reverse:
        steps.reverse()
    steps[0][0].copy_(state)
    for (entry, total_c, update), (after, _, _) in zip(steps, steps[1:]):
        torch.addcmul(update, total_c, entry, out=after)
    entry, total_c, update = steps[-1]
    return entries, torch.addcmul(update, total_c, entry)


def _tile_backward(chunks: Chunks, state: Tensor, do: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q (scaled), k, v, log_decay, shaped as in `chunks`, and of `state`, the one at the tile's start;
    do [M, C, V] and dstate [B * H, K, V] are those of the tile's output and of the state at its end."""
    merged = _merge(*chunks)
    entries, _ = _carry(merged.k_out.mT @ chunks.v, merged.total, state)
    dupdates, dstate = _carry(merged.q_in.mT @ do, merged.total, dstate, reverse=True)
    dv = torch.baddbmm(merged.scores.mT @ do, merged.k_out, dupdates)
    dtotal = (dupdates * entries).sum(-1)[:, None]  # [M, 1, K]
    dq, dk, dlog_decay = _merge_backward(
        chunks, merged, do @ chunks.v.mT, do @ entries.mT, chunks.v @ dupdates.mT, dtotal
    )
    return dq, dk, dv, dlog_decay, dstate


def _merge_backward(
    chunks: Chunks, merged: Merged, dscores: Tensor, dq_in: Tensor, dk_out: Tensor, dtotal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [M, C, K] of q, k and log_decay; overwrites dq_in and dk_out. dscores [M, C, C] counts where its query
    is not before its key, and is arbitrary elsewhere."""
    block = chunks.q.shape[1]
    for right, left, before, after in reversed(merged.levels):
        block //= 2
        quarter = _quarter(dscores, block)
        dproduct = (quarter * _own_block(quarter)).flatten(3).flatten(1, 2)  # [M, C/2, C/2]
        drights, dlefts = _halves(dq_in, block)[:, :, 1], _halves(dk_out, block)[:, :, 0]
        dtotal = dtotal.unsqueeze(2)  # [M, C/2b, 1, K]
        dbefore = (right * drights).sum(2, keepdim=True).addcmul_(dtotal, after)
        dafter = (left * dlefts).sum(2, keepdim=True).addcmul_(dtotal, before)
        drights.mul_(before).add_((dproduct @ left.flatten(1, 2)).view(right.shape))
        dlefts.mul_(after).add_((dproduct.mT @ right.flatten(1, 2)).view(left.shape))
        dtotal = torch.cat([dbefore, dafter], dim=2).flatten(1, 2)
    q, k, _, decay = chunks
    itself = dscores.diagonal(dim1=1, dim2=2)[..., None]  # [M, C, 1]
    dlog_decay = dtotal.addcmul(q, dq_in).mul_(decay)
    return dq_in.mul_(decay).addcmul_(itself, k), dk_out.addcmul_(itself, q), dlog_decay
