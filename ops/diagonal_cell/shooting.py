"""Multiple shooting: the segments of a sequence solved side by side from guessed start states, which are corrected.

A sweep runs all segments. The difference between where a segment ends, E_{s-1}, and where the next one started, x_s,
is the residual r_s. A correction solves the block-bidiagonal linear system over segments, x_s' = E_{s-1} + P_{s-1}
(x_{s-1}' - x_{s-1}), with P the product of the segment's Jacobians: Newton's method for the start states. After k
corrections the first k + 1 segments are the sequential loop's to the bit, whatever the rest does.

A channel is solved when its residuals, carried on through the segments after them, d_s = r_s + P_{s-1} d_{s-1}, are
within tolerance: they estimate how far the start states are from the sequential loop's. A small residual alone does
not do: where Jacobians grow, a mismatch of 1e-6 is all of the state some segments later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.diagonal_cell.cell import DiagonalCell
from ops.diagonal_cell.statistics import NUM_FIGURES
from ops.diagonal_cell.trajectory import Restarts, Trajectory, run

JACOBIAN_TOKENS = 32
"""Tokens a segment whose Jacobians are held at once."""


@dataclass(frozen=True)
class Shooting:
    """How to solve: number of segments, largest error, and corrections before a channel is solved sequentially."""

    segments: int
    tolerance: float
    max_corrections: int


@dataclass(frozen=True)
class Problem:
    """A cell, its weights [W, D], gates [B, T, G, D], the state [B, n, D] before them, and where documents start."""

    cell: DiagonalCell
    weights: Tensor
    gates: Tensor
    initial: Tensor
    restarts: Restarts | None

    def run(self, state: Tensor, tokens: slice, into: Trajectory) -> Tensor:
        return run(self.cell, self.weights, self.gates, state, self.restarts, tokens, into)

    def tokens(self, tokens: slice, state: Tensor) -> "Problem":
        """Of these tokens alone, from the state before them."""
        restarts = None if self.restarts is None else self.restarts.tokens(tokens)
        return Problem(self.cell, self.weights, self.gates[:, tokens], state, restarts)

    def rows(self, rows: Tensor) -> "Problem":
        restarts = None if self.restarts is None else self.restarts.rows(rows)
        return Problem(self.cell, self.weights, self.gates[rows], self.initial[rows], restarts)


def solve(problem: Problem, how: Shooting) -> tuple[Trajectory, Tensor]:
    """The trajectory, and the report of `ops.diagonal_cell.statistics`.

    The tokens that S segments of equal length leave over come at the end.
    """
    time = problem.gates.shape[1]
    into = Trajectory.starting(problem.cell, problem.initial, time)
    report = torch.zeros(NUM_FIGURES, dtype=torch.float64, device=problem.gates.device)
    report[0] = how.segments
    body = slice(0, time // how.segments * how.segments)
    if how.segments == 1:
        problem.run(problem.initial[:, None], body, into)
        return into, report
    error, report[1] = _shoot(problem, how, body, into)
    stubborn = ~(error <= how.tolerance)  # [B, D]; not a number is not solved
    report[2] = error.masked_fill(stubborn, 0).max()
    report[3] = stubborn.sum()
    _solve_sequentially(problem, stubborn, body, into)
    if body.stop < time:
        problem.run(into.state(body.stop - 1)[:, None], slice(body.stop, time), into)
    return into, report


def _shoot(problem: Problem, how: Shooting, body: slice, into: Trajectory) -> tuple[Tensor, int]:
    """Sweep and correct until every channel's error is within tolerance or the corrections are spent.

    Returns the errors [B, D] and the number of corrections.
    """
    batch, count, width = problem.initial.shape
    start = problem.initial.new_zeros(batch, how.segments, count, width)
    start[:, 0] = problem.initial
    bound = problem.cell.bound(problem.initial)
    product = None
    for corrections in range(how.max_corrections + 1):
        end = problem.run(start, body, into)
        error = _start_errors(end[:, :-1] - start[:, 1:], product)
        if corrections == how.max_corrections or bool((error <= how.tolerance).all()):
            break
        product = segment_products(problem, start, body, into)
        start = _corrected(start, end, product, bound)
    return error, corrections


def _start_errors(residual: Tensor, product: Tensor | None) -> Tensor:
    """[B, D], the largest of the start states' errors that residuals [B, S - 1, n, D] amount to.

    product [B, S, n, n, D] is of the sweep before; without one nothing but a residual of zero is known to be small.
    """
    if product is None:
        return torch.where(residual == 0, 0.0, torch.inf).to(residual.dtype).amax((1, 2))
    errors = [residual[:, 0]]
    for s in range(1, residual.shape[1]):
        errors.append(residual[:, s] + _moved(product[:, s], errors[-1]))
    return torch.stack(errors, dim=1).abs().amax((1, 2))


def _moved(product: Tensor, delta: Tensor) -> Tensor:
    """How far a segment's end moves with its start, [B, n, D]: one that does not move must not move the next, even
    where products overflow."""
    return torch.where((delta != 0).any(1, keepdim=True), (product * delta[:, None]).sum(2), 0.0)


def _corrected(start: Tensor, end: Tensor, product: Tensor, bound: Tensor | None) -> Tensor:
    """The next start states. Held within what the cell can reach: unbounded corrections grow to overflow."""
    starts = [start[:, 0]]
    delta = torch.zeros_like(starts[0])
    for s in range(1, start.shape[1]):
        change = _moved(product[:, s - 1], delta)
        state = end[:, s - 1] + torch.where(change.isfinite(), change, 0.0)
        starts.append(state if bound is None else torch.minimum(torch.maximum(state, -bound), bound))
        delta = starts[-1] - start[:, s]
    return torch.stack(starts, dim=1)


def _solve_sequentially(problem: Problem, stubborn: Tensor, body: slice, into: Trajectory) -> None:
    """Run the rows in which `stubborn` [B, D] marks a channel as one segment.

    Whole rows: among other neighbours a channel would meet other vector instructions, and where states are chaotic a
    difference in the last bit is all of the result in the end.
    """
    rows = stubborn.any(1).nonzero().squeeze(1)
    if rows.numel() == 0:
        return
    few = problem.rows(rows)
    part = Trajectory.starting(few.cell, few.initial, body.stop)
    few.run(few.initial[:, None], body, part)
    for whole, piece in zip((into.acts, *into.states), (part.acts, *part.states)):
        whole[rows, body] = piece


def segment_products(problem: Problem, start: Tensor, body: slice, into: Trajectory) -> Tensor:
    """[B, S, n, n, D]: of each segment's end by its start [B, S, n, D]; 0 where a document starts in between."""
    cut = (start.shape[1], (body.stop - body.start) // start.shape[1])
    gates, acts, *states = (z[:, body].unflatten(1, cut) for z in (problem.gates, into.acts, *into.states))
    restarts = problem.restarts
    keep = None if restarts is None else restarts.keep[:, body].unflatten(1, cut)  # [B, S, L, 1]
    product: Tensor | None = None
    for first in range(0, cut[1], JACOBIAN_TOKENS):
        piece = slice(first, min(first + JACOBIAN_TOKENS, cut[1]))
        before = _before(states, start, piece)
        if keep is not None:
            before = [z * keep[:, :, piece] for z in before]
        after = [z[:, :, piece] for z in states]
        jacobian = problem.cell.linearise(
            problem.weights, gates[:, :, piece], acts[:, :, piece], before, after
        ).jacobian
        if keep is not None:
            jacobian = jacobian * keep[:, :, piece, None, None]
        for step in jacobian.unbind(2):  # [B, S, n, n, D]
            product = step if product is None else compose(step, product)
    assert product is not None
    return product


def _before(states: Sequence[Tensor], start: Tensor, piece: slice) -> list[Tensor]:
    """n times [B, S, m, D], the states before each of a piece's tokens; states [B, S, L, D], start [B, S, n, D]."""
    if piece.start > 0:
        return [z[:, :, piece.start - 1 : piece.stop - 1] for z in states]
    return [
        torch.cat([first[:, :, None], z[:, :, : piece.stop - 1]], dim=2) for first, z in zip(start.unbind(2), states)
    ]


def compose(later: Tensor, earlier: Tensor) -> Tensor:
    """The product of matrices [..., n, n, D], one a channel."""
    product = later[..., :, :1, :] * earlier[..., :1, :, :]
    for k in range(1, later.shape[-2]):
        product.addcmul_(later[..., :, k : k + 1, :], earlier[..., k : k + 1, :, :])
    return product
