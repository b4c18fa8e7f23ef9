"""A slice as an affine map of the state before it: the step of multiple shooting in which the slices are segments."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ops.diagonal_cell.defaults import shooting_of
from ops.diagonal_cell.shooting import Problem, compose, segment_products, solve
from ops.diagonal_cell.trajectory import Trajectory

PIECE = 512
"""Tokens whose states and Jacobians are held at once, so that memory does not grow with the slice."""


def linearise_slice(problem: Problem) -> tuple[Tensor, Tensor]:
    """The state after the slice [B, n, D], and its derivative by the one before it [B, n, n, D].

    Where a product of Jacobians overflows there is nothing to learn from it, and the derivative is 0, so that what is
    built on it stays finite: corrections by such a channel are plain repetitions.
    """
    end, transition = problem.initial, None
    for first in range(0, problem.gates.shape[1], PIECE):
        part = problem.tokens(slice(first, first + PIECE), end)
        how = shooting_of(part.gates)
        trajectory, _ = solve(part, how)
        for product in _products(part, trajectory, how.segments):
            transition = product if transition is None else compose(product, transition)
        end = trajectory.state(part.gates.shape[1] - 1)
    assert transition is not None
    finite = transition.isfinite().all(1, keepdim=True).all(2, keepdim=True)
    return end, torch.where(finite, transition, 0.0)


def _products(problem: Problem, trajectory: Trajectory, segments: int) -> Iterator[Tensor]:
    """[B, n, n, D] of each of the equal segments and of the tokens that they leave over."""
    time = problem.gates.shape[1]
    length = time // segments
    body = slice(0, segments * length)
    start = torch.stack([trajectory.state(s * length - 1) for s in range(segments)], dim=1)
    yield from segment_products(problem, start, body, trajectory).unbind(1)
    if body.stop < time:
        start = trajectory.state(body.stop - 1).unsqueeze(1)
        yield segment_products(problem, start, slice(body.stop, time), trajectory)[:, 0]
