"""linear_scan with all chunks of a tile side by side, and a hand-written backward.

A tile is up to 32 chunks of up to 32 steps. A first pass runs every chunk from a zero state and keeps only where it
ends; a serial pass over chunks turns these ends into the state from which each chunk really starts; a second pass runs
all chunks again and writes the outputs. 1024 serial steps become 32 + 32 + 32.

The gradient g_t of h_t obeys the same recurrence backwards in time, g_t = dy_t + exp(log_decay_{t+1}) * g_{t+1}, from
g_T = dy_T + the gradient of the last state; dx = g, and dlog_decay_t = exp(log_decay_t) * g_t * h_{t-1}. A reset is a
decay of 0: it cuts every path across it, forward and backward. Nothing is ever divided by a decay.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    y, state = LinearScan.apply(x.to(dtype), log_decay.to(dtype), initial_state.to(dtype), starts)
    return y.to(x.dtype), state


class LinearScan(torch.autograd.Function):
    """(x, log_decay [B, T, D], initial_state [B, D], starts bool [B, T] or None) -> (y [B, T, D], state [B, D]).

    Everything is done tile by tile: the op is bound by memory, and a tile stays in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_decay: Tensor, initial_state: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        decay, y = x.new_empty(x.shape), x.new_empty(x.shape)
        state = initial_state
        for tile, shape in _tiles(x.shape[1]):
            torch.exp(log_decay[:, tile], out=decay[:, tile])
            if starts is not None:
                decay[:, tile].masked_fill_(starts[:, tile, None], 0)
            state = _scan(x[:, tile], decay[:, tile], y[:, tile], shape, state)
        ctx.save_for_backward(decay, y, initial_state)
        return y, state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        decay, y, initial_state = ctx.saved_tensors
        dx, dlog_decay = y.new_empty(y.shape), y.new_empty(y.shape)
        g = torch.add(dy[:, -1], dstate, out=dx[:, -1])
        for tile, shape in reversed(_tiles(y.shape[1] - 1)):
            after = slice(tile.start + 1, tile.stop + 1)
            g = _scan(dy[:, tile], decay[:, after], dx[:, tile], shape, g, reverse=True)
            torch.mul(decay[:, after], dx[:, after], out=dlog_decay[:, after]).mul_(y[:, tile])
        dinitial_state = decay[:, 0] * dx[:, 0]
        torch.mul(dinitial_state, initial_state, out=dlog_decay[:, 0])
        return dx, dlog_decay, dinitial_state, None


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


def _scan(x: Tensor, decay: Tensor, y: Tensor, shape: tuple[int, int], state: Tensor, reverse: bool = False) -> Tensor:
    """Write y_t = x_t + decay_t * y_{t-1} for one tile of shape (chunks, steps); x, decay, y [B, chunks * steps, D].

    `state` [B, D] is the y before the first token; in reverse, y_t = x_t + decay_t * y_{t+1} and it is the one after
    the last. Returns the y at the other end.
    """
    order = slice(None, None, -1 if reverse else 1)
    steps = list(zip(*(z.unflatten(1, shape).unbind(2) for z in (x, decay, y))))[order]  # [B, chunks, D] each
    h = state[:, None]
    if shape[0] > 1:
        end, total = steps[0][:2]  # where each chunk ends when it starts from zero; the product of its decays
        for x_t, decay_t, _ in steps[1:]:
            end = torch.addcmul(x_t, decay_t, end)
            total = decay_t * total
        entries = [state]
        for end_c, total_c in list(zip(end.unbind(1), total.unbind(1)))[order]:
            entries.append(torch.addcmul(end_c, total_c, entries[-1]))
        h = torch.stack(entries[:-1][order], dim=1)
    for x_t, decay_t, y_t in steps:
        h = torch.addcmul(x_t, decay_t, h, out=y_t)
    return h[:, 0 if reverse else -1]
