"""Multiple shooting: the segments of a sequence solved side by side from guessed start states, which are corrected.

A sweep runs all segments. The difference between where a segment ends, E_{s-1}, and where the next one started, x_s,
is the residual. A correction solves the block-bidiagonal linear system over segments, x_s' = E_{s-1} + P_{s-1}
(x_{s-1}' - x_{s-1}), with P the product of the segment's Jacobians: Newton's method for the start states. After k
corrections the first k + 1 segments are the sequential loop's to the bit, whatever the rest does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.diagonal_lstm.trajectory import Cell, Restarts, Trajectory, jacobians, run, slopes

JACOBIAN_TOKENS = 32
"""Tokens a segment whose Jacobians are held at once."""


@dataclass
class Statistics:
    """How the last call of `ops.diagonal_lstm` that was given this object was solved.

    Attributes:
        segments: S; 1 is the plain sequential loop.
        corrections: of the start states, after the first sweep.
        residual: largest mismatch of a state between two segments among the channels that shooting solved.
        sequential_channels: (row, channel) pairs that were left to the sequential loop.
    """

    segments: int = 1
    corrections: int = 0
    residual: float = 0.0
    sequential_channels: int = 0


@dataclass(frozen=True)
class Shooting:
    """How to solve: number of segments, largest residual, and corrections before a channel is solved sequentially."""

    segments: int
    tolerance: float
    max_corrections: int


def solve(
    gates: Tensor, cell: Cell, state: Tensor, restarts: Restarts | None, how: Shooting, statistics: Statistics
) -> Trajectory:
    """The trajectory from `state` [B, 2, D]; the tokens that S segments of equal length leave over come at the end."""
    time = gates.shape[1]
    into = Trajectory.starting(state, time)
    length = time // how.segments
    body = slice(0, length * how.segments)
    statistics.segments, statistics.corrections = how.segments, 0
    statistics.residual, statistics.sequential_channels = 0.0, 0
    if how.segments == 1:
        run(gates, cell, state[:, None], restarts, body, into)
        return into
    residual = _shoot(gates, cell, state, restarts, how, into, statistics)
    stubborn = residual > how.tolerance  # [B, D]
    statistics.sequential_channels = int(stubborn.sum())
    statistics.residual = float(residual.masked_fill(stubborn, 0).max())
    if statistics.sequential_channels:
        _solve_sequentially(gates, cell, restarts, stubborn, body, into)
    if body.stop < time:
        run(gates, cell, into.state(body.stop - 1)[:, None], restarts, slice(body.stop, time), into)
    return into


def _shoot(
    gates: Tensor,
    cell: Cell,
    state: Tensor,
    restarts: Restarts | None,
    how: Shooting,
    into: Trajectory,
    statistics: Statistics,
) -> Tensor:
    """Sweep and correct until every channel's residual is within tolerance or the corrections are spent; [B, D]."""
    batch, _, width = state.shape
    body = slice(0, gates.shape[1] // how.segments * how.segments)
    start = state.new_zeros(batch, how.segments, 2, width)
    start[:, 0] = state
    # A cell is a mean of tanh values and the initial cell; h is a product of a sigmoid and a tanh.
    bound = torch.stack([state[:, 0].abs().clamp_min(1), torch.ones_like(state[:, 0])], dim=1)  # [B, 2, D]
    while True:
        end = run(gates, cell, start, restarts, body, into)
        residual = (end[:, :-1] - start[:, 1:]).abs().amax((1, 2))
        if statistics.corrections >= how.max_corrections or bool((residual <= how.tolerance).all()):
            return residual
        product = _segment_products(cell, start, restarts, body, into)
        start = _corrected(start, end, product, bound)
        statistics.corrections += 1


def _segment_products(cell: Cell, start: Tensor, restarts: Restarts | None, body: slice, into: Trajectory) -> Tensor:
    """[B, S, 2, 2, D]: of each segment's end by its start."""
    cut = (start.shape[1], body.stop // start.shape[1])
    acts = into.acts[:, body].unflatten(1, cut)
    previous = into.cells[:, body].unflatten(1, cut)
    keep = None if restarts is None else restarts.keep[:, body].unflatten(1, cut)[..., None, None, :]
    product: Tensor | None = None
    for first in range(0, cut[1], JACOBIAN_TOKENS):
        piece = slice(first, first + JACOBIAN_TOKENS)
        before = previous[:, :, piece]
        if first == 0:
            before = torch.cat([start[:, :, None, 0], before[:, :, 1:]], dim=2)
        if keep is not None:
            before = before * keep[:, :, piece, 0, 0]
        jacobian = jacobians(cell, acts[:, :, piece], slopes(cell, acts[:, :, piece], before))
        if keep is not None:
            jacobian *= keep[:, :, piece]
        for step in jacobian.unbind(2):  # [B, S, 2, 2, D]
            if product is None:
                product = step
                continue
            by_cell, by_hidden = step.unsqueeze(4).unbind(3)  # [B, S, 2, 1, D]
            product = torch.mul(by_cell, product[:, :, :1]).addcmul_(by_hidden, product[:, :, 1:])
    assert product is not None
    return product


def _corrected(start: Tensor, end: Tensor, product: Tensor, bound: Tensor) -> Tensor:
    """The next start states. Held within what the cell can reach: unbounded corrections grow to overflow."""
    starts = [start[:, 0]]
    delta = torch.zeros_like(starts[0])
    for s in range(1, start.shape[1]):
        change = (product[:, s - 1] * delta[:, None]).sum(2)  # [B, 2, D]
        # Where the products overflow there is nothing to learn; a start that did not move must not move the next.
        change = torch.where(change.isfinite() & (delta != 0).any(1, keepdim=True), change, 0.0)
        starts.append(torch.minimum(torch.maximum(end[:, s - 1] + change, -bound), bound))
        delta = starts[-1] - start[:, s]
    return torch.stack(starts, dim=1)


def _solve_sequentially(
    gates: Tensor, cell: Cell, restarts: Restarts | None, stubborn: Tensor, body: slice, into: Trajectory
) -> None:
    """Run the channels that `stubborn` [B, D] marks as one segment."""
    row, channel = stubborn.nonzero(as_tuple=True)  # [M] each

    def gather(z: Tensor) -> Tensor:  # [B, ..., D] -> [1, ..., M]
        return z.movedim(-1, 1)[row, channel].movedim(0, -1)[None].contiguous()

    state = torch.stack([gather(into.cells[:, 0]), gather(into.hiddens[:, 0])], dim=1)
    few = None
    if restarts is not None:
        few = Restarts(restarts.keep[row, :, 0].T[None].contiguous(), restarts.steps)
    part = Trajectory.starting(state, body.stop)
    weights = Cell(cell.a[:, channel], cell.c[:, channel])
    run(gather(gates[:, body]), weights, state[:, None], few, body, part)
    for whole, piece in zip((into.acts, into.cells, into.hiddens), (part.acts, part.cells, part.hiddens)):
        target = whole[:, : piece.shape[1]].movedim(-1, 1)
        target[row, channel] = piece[0].movedim(-1, 0)
