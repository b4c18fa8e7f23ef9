"""What a diagonal cell is, and what the solver asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

Channels = Sequence[Tensor]
"""Tensors [..., D] that broadcast against each other: one a state, gate or weight of the cell."""
Step = Callable[[Channels, Channels, Channels], Channels]
Advance = Callable[[int, Channels], Channels]


class Linearised(NamedTuple):
    """A cell's steps around a trajectory.

    Attributes:
        jacobian: [..., n, n, D], of the states after a step by those before it.
        pullback: called with the gradient of the states after the steps [..., n, D], writes that of the gates
            [..., G, D] and adds that of the weights [W, D], summed over all steps.
    """

    jacobian: Tensor
    pullback: Callable[[Tensor, Tensor, Tensor], None]


class DiagonalCell(ABC):
    """A recurrence of n states a channel, in which no channel sees another.

    name:    of the op, as registered
    step:    (states before, gates of the token, weights) -> states after, made of elementwise operations on tensors
             [..., D]
    states, gates, weights: how many of each a channel has: n, G, W
    output:  the state that is the recurrence's output

    `ops.diagonal_cell.derived.DerivedCell` needs no more than that. A cell that gives the methods by hand, for speed,
    lets them hand on `num_acts` tensors a channel and token to each other.
    """

    num_acts = 0
    needs_gates = False
    """Whether `linearise` reads the gates, which are kept for the backward pass then."""

    def __init__(self, name: str, step: Step, *, states: int, gates: int, weights: int, output: int = 0) -> None:
        self.name = name
        self.step = step
        self.num_states = states
        self.num_gates = gates
        self.num_weights = weights
        self.output = output

    def bound(self, state: Tensor) -> Tensor | None:
        """[B, n, D], the largest magnitude that states reach from `state` [B, n, D]; None if it is not known."""
        return None

    @abstractmethod
    def stepper(self, weights: Tensor, gates: Tensor, acts: Tensor, states: Sequence[Tensor]) -> Advance:
        """`advance(i, before) -> after` for step i of segments side by side, all [B, S, D], which also writes.

        weights [W, D], gates [B, S, L, G, D]; written are acts [B, S, L, num_acts, D] and states, n times [B, S, L, D].
        """

    @abstractmethod
    def linearise(
        self, weights: Tensor, gates: Tensor | None, acts: Tensor, before: Channels, after: Channels
    ) -> Linearised:
        """Around steps: gates [..., G, D], or None unless `needs_gates`; acts [..., num_acts, D]; states [..., D]."""
