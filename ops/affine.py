"""Affine maps of a recurrence's state, and how they compose: what a slice of a sequence does to the state before it."""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.precision import without_autocast


class Affine(NamedTuple):
    """state -> transition * state + offset.

    What `*` means is told by the shapes, state and offset being alike:

        [B, D] or [B, H, K]     on states [B, D] or [B, H, K, V]: a factor for each channel (linear_scan,
                                gated_linear_attention)
        [B, HV, K, K]           on states [B, HV, K, V]: a matrix for each head (gated_delta_rule)
        [B, n, n, D]            on states [B, n, D]: an n x n matrix for each channel (the Jacobian of a diagonal
                                nonlinear cell, around the state it was taken at)

    Differentiable, and in the precision of the state under autocast, too. Slices in the order of time compose with
    `then`; the cost and the memory do not depend on their length, which is what sequence parallelism rests on.
    """

    transition: Tensor
    offset: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        """The state after the slice."""
        with without_autocast(state):
            return _act(self.transition, state) + self.offset

    def then(self, later: "Affine") -> "Affine":
        """This slice followed by `later`, as one."""
        with without_autocast(self.offset):
            return Affine(_compose(later.transition, self.transition, self.offset), later(self.offset))


def _act(transition: Tensor, state: Tensor) -> Tensor:
    if transition.dim() < state.dim():  # [B, H, K] on [B, H, K, V]
        return transition.unsqueeze(-1) * state
    if transition.dim() > state.dim():  # [B, n, n, D] on [B, n, D]
        return torch.einsum("bijd,bjd->bid", transition, state)
    return transition * state if transition.dim() == 2 else transition @ state


def _compose(later: Tensor, earlier: Tensor, state: Tensor) -> Tensor:
    if later.dim() > state.dim():
        return torch.einsum("bijd,bjkd->bikd", later, earlier)
    return later @ earlier if later.dim() == 4 else later * earlier
