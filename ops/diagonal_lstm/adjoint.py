"""The backward pass of diagonal_lstm: linear, so that one pass over segments is exact.

With lambda_t the gradient of the state (cell, hidden) after token t through later tokens alone, and J_t its Jacobian,
lambda_{t-1} = J_t^T (lambda_t + (0, dy_t)), from the gradient of the last state. A tile is up to TILE_SEGMENTS segments
of TILE_STEPS tokens: a first pass reduces each segment to an affine map of the lambda at its end, a serial pass over
segments gives each its own, a second pass writes all of them. The gradients of gates and weights are elementwise in
them. A restart is a Jacobian of 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.diagonal_lstm.trajectory import Cell, Restarts, Slopes, Trajectory, jacobians, slopes

TILE_SEGMENTS = 16
TILE_STEPS = 16


@dataclass(frozen=True)
class Gradients:
    """Of gates [B, T, 3, D], a [3, D], c [2, D] and the initial state [B, 2, D]."""

    gates: Tensor
    a: Tensor
    c: Tensor
    initial_state: Tensor


def backward(dy: Tensor, dstate: Tensor, cell: Cell, restarts: Restarts | None, trajectory: Trajectory) -> Gradients:
    """From the gradients of h [B, T, D] and of the last state [B, 2, D]."""
    dgates = dy.new_empty(*dy.shape[:2], 3, dy.shape[2])
    da, dc = torch.zeros_like(cell.a), torch.zeros_like(cell.c)
    incoming = dstate
    for tokens, shape in reversed(_tiles(dy.shape[1])):
        acts, after = trajectory.acts[:, tokens], trajectory.cells[:, tokens.start + 1 : tokens.stop + 1]
        previous, h = trajectory.cells[:, tokens], trajectory.hiddens[:, tokens]
        keep = restarts.keep[:, tokens] if restarts is not None and restarts.any(tokens) else None
        if keep is not None:
            previous, h = previous * keep, h * keep
        slope = slopes(cell, acts, previous)
        jacobian = jacobians(cell, acts, slope)
        if keep is not None:
            jacobian *= keep[:, :, None, None]
        later, incoming = _propagate(jacobian, dy[:, tokens], incoming, shape)
        _gate_gradients(slope, later, dy[:, tokens], dgates[:, tokens])
        da += (dgates[:, tokens] * h.unsqueeze(2)).sum((0, 1))
        dc[0] += (dgates[:, tokens, 0] * previous).sum((0, 1))
        dc[1] += (dgates[:, tokens, 1] * after).sum((0, 1))
    return Gradients(dgates, da, dc, incoming)


def _tiles(time: int) -> list[tuple[slice, tuple[int, int]]]:
    """Cut `time` tokens into tiles of segments * steps, each its tokens and (segments, steps)."""
    tiles = []
    start, steps = 0, min(TILE_STEPS, math.isqrt(time))
    while start < time:
        steps = min(steps, time - start)
        segments = min(TILE_SEGMENTS, (time - start) // steps)
        tiles.append((slice(start, start + segments * steps), (segments, steps)))
        start += segments * steps
    return tiles


def _propagate(jacobian: Tensor, dy: Tensor, last: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """lambda [B, n, 2, D] of a tile's n tokens, and [B, 2, D] of the token before them.

    jacobian [B, n, 2, 2, D], dy [B, n, D]; last [B, 2, D] is the lambda of the tile's last token.
    """
    by_cell, by_hidden = jacobian.unflatten(1, shape).unbind(3)  # [B, segments, steps, 2, D]
    source = by_hidden * dy.unflatten(1, shape).unsqueeze(3)
    steps = list(zip(by_cell.unbind(2), by_hidden.unbind(2), source.unbind(2)))
    ends = [last]
    if shape[0] > 1:
        for weight_cell, weight_hidden, offset in _segment_maps(steps)[:0:-1]:  # the first segment's is not needed
            ends.append(torch.addcmul(offset, weight_cell, ends[-1][:, :1]).addcmul_(weight_hidden, ends[-1][:, 1:]))
    later = torch.empty_like(source)
    later_steps = later.unbind(2)
    later_steps[-1].copy_(torch.stack(ends[::-1], dim=1))
    before = torch.empty_like(later_steps[0])
    for i in range(shape[1] - 1, -1, -1):
        cell_t, hidden_t, source_t = steps[i]
        target = later_steps[i - 1] if i else before
        torch.addcmul(source_t, cell_t, later_steps[i][:, :, :1], out=target)
        target.addcmul_(hidden_t, later_steps[i][:, :, 1:])
    return later.flatten(1, 2), before[:, 0]


def _segment_maps(steps: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each segment (weight of the cell's lambda, of the hidden's, offset), [B, 2, D] each: the lambda before its
    first token as an affine map of the one of its last."""
    total = torch.stack(steps[-1], dim=3)  # [B, segments, 2, 3, D]
    for by_cell, by_hidden, source in steps[-2::-1]:
        total = torch.mul(by_cell.unsqueeze(3), total[:, :, :1]).addcmul_(by_hidden.unsqueeze(3), total[:, :, 1:])
        total[:, :, :, 2] += source
    weight_cell, weight_hidden, offset = (part.unbind(1) for part in total.unbind(3))
    return list(zip(weight_cell, weight_hidden, offset))


def _gate_gradients(slope: Slopes, later: Tensor, dy: Tensor, dgates: Tensor) -> None:
    """Write the gradients of the pre-activations, [B, n, 3, D]."""
    dhidden = later[:, :, 1] + dy
    dcell = torch.addcmul(later[:, :, 0], slope.hidden, dhidden)
    torch.mul(dcell, slope.forget, out=dgates[:, :, 0])
    torch.mul(dhidden, slope.output, out=dgates[:, :, 1])
    torch.mul(dcell, slope.candidate, out=dgates[:, :, 2])
