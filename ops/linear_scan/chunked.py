"""linear_scan with all chunks of a tile side by side, as registered ops with a hand-written backward.

A tile is up to 32 chunks of up to 32 steps. A first pass runs every chunk from a zero state and keeps only where it
ends; a serial pass over chunks turns these ends into the state from which each chunk really starts; a second pass runs
all chunks again and writes the outputs. 1024 serial steps become 32 + 32 + 32.

The gradient g_t of h_t obeys the same recurrence backwards in time, g_t = dy_t + exp(log_decay_{t+1}) * g_{t+1}, from
g_T = dy_T + the gradient of the last state; dx = g, and dlog_decay_t = exp(log_decay_t) * g_t * h_{t-1}. A reset is a
decay of 0: it cuts every path across it, forward and backward. Nothing is ever divided by a decay.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype

MAX_STEPS = 32
MAX_CHUNKS = 32


def linear_scan(
    x: Tensor, log_decay: Tensor, layout: Layout | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last state [B, D]; arguments as in `ops.linear_scan`."""
    dtype = accumulation_dtype(x, log_decay)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype)
    starts = None if layout is None else layout.starts
    y, state, _ = forward(x.to(dtype), log_decay.to(dtype), initial_state.to(dtype), starts)
    return y.to(x.dtype), state


def linear_scan_summary(x: Tensor, log_decay: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
    """The product of all decays and the last state from zero, each [B, D]; arguments as in `ops.linear_scan`."""
    dtype = accumulation_dtype(x, log_decay)
    return summary(x.to(dtype), log_decay.to(dtype), None if layout is None else layout.starts)


@torch.library.custom_op("rondo::linear_scan_chunked_forward", mutates_args=())
def forward(
    x: Tensor, log_decay: Tensor, initial_state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D], the last state [B, D], and for the backward the decays [B, T, D].

    x, log_decay: [B, T, D] and initial_state: [B, D], all of one dtype; starts: bool [B, T].
    Everything is done tile by tile: the op is bound by memory, and a tile stays in the cache.
    """
    y, decay = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    state = initial_state
    for tile, shape in _tiles(x.shape[1]):
        _write_decay(decay[:, tile], log_decay, starts, tile)
        state = _scan(x[:, tile], decay[:, tile], y[:, tile], shape, state)
    return y, state.clone(), decay


@torch.library.custom_op("rondo::linear_scan_chunked_backward", mutates_args=())
def backward(
    dy: Tensor, dstate: Tensor, decay: Tensor, y: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dlog_decay [B, T, D] and dinitial_state [B, D] of `forward`, whose outputs are y and decay."""
    dx, dlog_decay = torch.empty_like(y), torch.empty_like(y)
    g = torch.add(dy[:, -1], dstate, out=dx[:, -1])
    for tile, shape in reversed(_tiles(y.shape[1] - 1)):
        after = slice(tile.start + 1, tile.stop + 1)
        g = _scan(dy[:, tile], decay[:, after], dx[:, tile], shape, g, reverse=True)
        torch.mul(decay[:, after], dx[:, after], out=dlog_decay[:, after]).mul_(y[:, tile])
    dinitial_state = decay[:, 0] * dx[:, 0]
    torch.mul(dinitial_state, initial_state, out=dlog_decay[:, 0])
    return dx, dlog_decay, dinitial_state


@torch.library.custom_op("rondo::linear_scan_chunked_summary", mutates_args=())
def summary(x: Tensor, log_decay: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product of all decays, 0 where a document starts, and the last state from zero, each [B, D].

    Arguments as in `forward`. No output of a token is ever written: memory is that of one tile's decays.
    """
    total, state = x.new_ones(x[:, 0].shape), x.new_zeros(x[:, 0].shape)
    buffer = x.new_empty(x.shape[0], min(x.shape[1], MAX_CHUNKS * MAX_STEPS), x.shape[2])
    for tile, shape in _tiles(x.shape[1]):
        decay = _write_decay(buffer[:, : tile.stop - tile.start], log_decay, starts, tile)
        chunks = (z.unflatten(1, shape).unbind(2) for z in (x[:, tile], decay))
        for end_c, total_c in zip(*(z.unbind(1) for z in _summaries(*chunks))):
            state = torch.addcmul(end_c, total_c, state)
            total = total_c * total
    return total, state


@forward.register_fake
def _(x: Tensor, log_decay: Tensor, initial_state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    y, decay = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return y, x.new_empty(x.shape[0], x.shape[2]), decay


@backward.register_fake
def _(dy: Tensor, dstate: Tensor, decay: Tensor, y: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(y), y.new_empty(y.shape[0], y.shape[2])


@summary.register_fake
def _(x: Tensor, log_decay: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], x.shape[2]), x.new_empty(x.shape[0], x.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    y, _, decay = output
    ctx.mark_non_differentiable(decay)
    ctx.set_materialize_grads(False)  # a gradient of decay would be a tensor of zeros as large as x
    ctx.save_for_backward(decay, y, inputs[2])


def _differentiate(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Tensor, Tensor, Tensor, None]:
    decay, y, initial_state = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dstate = torch.zeros_like(initial_state) if dstate is None else dstate
    return *backward(dy, dstate, decay, y, initial_state), None


def _save_summary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[0], inputs[2])


def _differentiate_summary(ctx: Any, dtotal: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, None]:
    x, log_decay, total, starts = ctx.saved_tensors
    zero = torch.zeros_like(total)
    y, _, decay = forward(x, log_decay, zero, starts)
    dx, dlog_decay, _ = backward(torch.zeros_like(x), dstate, decay, y, zero)
    return dx, dlog_decay + (dtotal * total)[:, None], None


forward.register_autograd(_differentiate, setup_context=_save)
summary.register_autograd(_differentiate_summary, setup_context=_save_summary)


def _tiles(time: int) -> list[tuple[slice, tuple[int, int]]]:
    """Cut `time` tokens into tiles of chunks * steps, each its tokens and (chunks, steps); the rest is one chunk."""
    tiles = []
    start, steps = 0, min(MAX_STEPS, math.isqrt(time))
    while start < time:
        steps = min(steps, time - start)
        chunks = min(MAX_CHUNKS, (time - start) // steps)
        tiles.append((slice(start, start + chunks * steps), (chunks, steps)))
        start += chunks * steps
    return tiles


def _write_decay(decay: Tensor, log_decay: Tensor, starts: Tensor | None, tile: slice) -> Tensor:
    """exp(log_decay) of the tokens of `tile` in `decay`, 0 where a document starts."""
    torch.exp(log_decay[:, tile], out=decay)
    return decay if starts is None else decay.masked_fill_(starts[:, tile, None], 0)


def _scan(x: Tensor, decay: Tensor, y: Tensor, shape: tuple[int, int], state: Tensor, reverse: bool = False) -> Tensor:
    """Write y_t = x_t + decay_t * y_{t-1} for one tile of shape (chunks, steps); x, decay, y [B, chunks * steps, D].

    `state` [B, D] is the y before the first token; in reverse, y_t = x_t + decay_t * y_{t+1} and it is the one after
    the last. Returns the y at the other end.
    """
    order = slice(None, None, -1 if reverse else 1)
    x_of, decay_of, y_of = (z.unflatten(1, shape).unbind(2)[order] for z in (x, decay, y))  # [B, chunks, D] each step
    h = state[:, None]
    if shape[0] > 1:
        entries = [state]
        ends, totals = _summaries(x_of, decay_of)
        for end_c, total_c in list(zip(ends.unbind(1), totals.unbind(1)))[order]:
            entries.append(torch.addcmul(end_c, total_c, entries[-1]))
        h = torch.stack(entries[:-1][order], dim=1)
    for x_t, decay_t, y_t in zip(x_of, decay_of, y_of):
        h = torch.addcmul(x_t, decay_t, h, out=y_t)
    return h[:, 0 if reverse else -1]


def _summaries(x: Sequence[Tensor], decay: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where each chunk ends when it starts from zero, and the product of its decays; x, decay [B, chunks, D] a step."""
    end, total = x[0].clone(), decay[0].clone()
    for x_t, decay_t in zip(x[1:], decay[1:]):  # in place: fresh memory at every step would cost as much as the sums
        torch.addcmul(x_t, decay_t, end, out=end)
        total.mul_(decay_t)
    return end, total
