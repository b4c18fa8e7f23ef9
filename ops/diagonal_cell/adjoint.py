"""The backward pass of a diagonal cell: linear, so that one pass over segments is exact.

With lambda_t the gradient of the states after token t through later tokens alone, and J_t the cell's Jacobian,
lambda_{t-1} = J_t^T (lambda_t + dy_t at the output state), from the gradient of the last state. A tile is up to
TILE_SEGMENTS segments of TILE_STEPS tokens: a first pass reduces each segment to an affine map of the lambda at its
end, a serial pass over segments gives each its own, a second pass writes all of them. The gradients of gates and
weights are elementwise in them. A restart is a Jacobian of 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ops.diagonal_cell.cell import DiagonalCell
from ops.diagonal_cell.trajectory import Restarts, Trajectory

TILE_SEGMENTS = 16
TILE_STEPS = 16


class Gradients(NamedTuple):
    """Of gates [B, T, G, D], weights [W, D] and the initial state [B, n, D]."""

    gates: Tensor
    weights: Tensor
    initial: Tensor


def backward(
    cell: DiagonalCell,
    dy: Tensor,
    dstate: Tensor,
    weights: Tensor,
    gates: Tensor | None,
    restarts: Restarts | None,
    trajectory: Trajectory,
) -> Gradients:
    """From the gradients of the output [B, T, D] and of the last state [B, n, D]; gates where the cell needs them."""
    dgates = dy.new_empty(*dy.shape[:2], cell.num_gates, dy.shape[2])
    dweights = torch.zeros_like(weights)
    incoming = dstate
    for tokens, shape in reversed(_tiles(dy.shape[1])):
        before, after = trajectory.before(tokens), [z[:, tokens] for z in trajectory.states]
        keep = None if restarts is None else restarts.within(tokens)
        if keep is not None:
            before = [z * keep for z in before]
        here = None if gates is None else gates[:, tokens]
        jacobian, pullback = cell.linearise(weights, here, trajectory.acts[:, tokens], before, after)
        if keep is not None:
            jacobian = jacobian * keep[:, :, None, None]
        later, incoming = _propagate(jacobian, dy[:, tokens], cell.output, incoming, shape)
        later.select(2, cell.output).add_(dy[:, tokens])
        pullback(later, dgates[:, tokens], dweights)
    return Gradients(dgates, dweights, incoming.contiguous())


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


class Reverse(NamedTuple):
    """One token of every segment: lambda before it = offset + sum over i of by[i] * (lambda after it)[i].

    Attributes:
        by: n times [B, segments, n, D], the rows of the Jacobian.
        offset: [B, segments, n, D].
    """

    by: tuple[Tensor, ...]
    offset: Tensor


def _propagate(
    jacobian: Tensor, dy: Tensor, output: int, last: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """lambda [B, m, n, D] of a tile's m tokens, and [B, n, D] of the token before them.

    jacobian [B, m, n, n, D], dy [B, m, D]; last [B, n, D] is the lambda of the tile's last token.
    """
    rows = jacobian.unflatten(1, shape).unbind(3)  # [B, segments, steps, n, D] each
    offset = rows[output] * dy.unflatten(1, shape).unsqueeze(3)
    by = zip(*(row.unbind(2) for row in rows))
    steps = [Reverse(*pair) for pair in zip(by, offset.unbind(2))]
    ends = [last]
    if shape[0] > 1:
        for total in _segment_maps(steps)[:0:-1]:  # the first segment's is not needed
            ends.append(_reversed(total, ends[-1].unbind(1), torch.empty_like(last)))
    later = torch.empty_like(offset)
    later_steps = later.unbind(2)
    later_steps[-1].copy_(torch.stack(ends[::-1], dim=1))
    before = torch.empty_like(later_steps[0])
    for i in range(shape[1] - 1, -1, -1):
        _reversed(steps[i], later_steps[i].unbind(2), later_steps[i - 1] if i else before)
    return later.flatten(1, 2), before[:, 0]


def _reversed(step: Reverse, later: tuple[Tensor, ...], into: Tensor) -> Tensor:
    """Apply a step to n times [..., D]; into [..., n, D]."""
    torch.addcmul(step.offset, step.by[0], later[0].unsqueeze(-2), out=into)
    for weight, part in zip(step.by[1:], later[1:]):
        into.addcmul_(weight, part.unsqueeze(-2))
    return into


def _segment_maps(steps: list[Reverse]) -> list[Reverse]:
    """For each segment, [B, n, D] each: the lambda before its first token by the one of its last."""
    total = torch.stack([*steps[-1].by, steps[-1].offset], dim=3)  # [B, segments, n, n + 1, D]
    count = len(steps[-1].by)
    for by, offset in steps[-2::-1]:
        earlier = torch.mul(by[0].unsqueeze(3), total[:, :, :1])
        for i in range(1, count):
            earlier.addcmul_(by[i].unsqueeze(3), total[:, :, i : i + 1])
        earlier[:, :, :, count] += offset
        total = earlier
    *weights, offset = total.unbind(3)
    return [Reverse(*pair) for pair in zip(zip(*(weight.unbind(1) for weight in weights)), offset.unbind(1))]
