"""The forward recurrence over given tokens, for any number of segments side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.diagonal_cell.cell import DiagonalCell


@dataclass(frozen=True)
class Restarts:
    """Where documents start.

    Attributes:
        keep: [B, T, 1], 0 where a document starts, else 1, in the dtype of the recurrence.
        steps: T booleans, False where no row starts a document; all True where reading them would synchronise.
    """

    keep: Tensor
    steps: list[bool]

    @classmethod
    def of(cls, starts: Tensor | None, dtype: torch.dtype) -> "Restarts | None":
        """From bool [B, T]; None where no document is known to start."""
        if starts is None:
            return None
        keep = (~starts).to(dtype).unsqueeze(2)
        if starts.device.type != "cpu":
            return cls(keep, [True] * starts.shape[1])
        steps = starts.any(0).tolist()
        return cls(keep, steps) if any(steps) else None

    def tokens(self, tokens: slice) -> "Restarts":
        return Restarts(self.keep[:, tokens], self.steps[tokens])

    def rows(self, rows: Tensor) -> "Restarts":
        return Restarts(self.keep[rows], self.steps)

    def within(self, tokens: slice) -> Tensor | None:
        """[B, n, 1] of n tokens, None where no document starts in them."""
        return self.keep[:, tokens] if any(self.steps[tokens]) else None

    def at(self, tokens: slice, length: int) -> list[Tensor | None]:
        """For each step of segments of `length` cut from `tokens`, [B, S, 1], None where no document starts."""
        keep, steps = self.keep[:, tokens], self.steps[tokens]
        return [keep[:, i::length] if any(steps[i::length]) else None for i in range(length)]


@dataclass(frozen=True)
class Trajectory:
    """All that the backward pass needs of a forward one.

    Attributes:
        initial: [B, n, D], the state before the first token.
        acts: [B, T, num_acts, D], what the cell keeps of a step.
        states: n times [B, T, D], after each token.
    """

    initial: Tensor
    acts: Tensor
    states: Sequence[Tensor]

    @classmethod
    def starting(cls, cell: DiagonalCell, initial: Tensor, time: int) -> "Trajectory":
        """Empty but for the initial state [B, n, D]."""
        batch, count, width = initial.shape
        states = [initial.new_empty(batch, time, width) for _ in range(count)]
        return cls(initial, initial.new_empty(batch, time, cell.num_acts, width), states)

    def state(self, token: int) -> Tensor:
        """[B, n, D] after `token`; -1 for the initial one."""
        return self.initial if token < 0 else torch.stack([z[:, token] for z in self.states], dim=1)

    def before(self, tokens: slice) -> list[Tensor]:
        """n times [B, m, D], the states before each of m tokens, were there no restart."""
        if tokens.start > 0:
            return [z[:, tokens.start - 1 : tokens.stop - 1] for z in self.states]
        return [
            torch.cat([first[:, None], z[:, : tokens.stop - 1]], dim=1)
            for first, z in zip(self.initial.unbind(1), self.states)
        ]


def run(
    cell: DiagonalCell,
    weights: Tensor,
    gates: Tensor,
    state: Tensor,
    restarts: Restarts | None,
    tokens: slice,
    into: Trajectory,
) -> Tensor:
    """Run `tokens` of gates [B, T, G, D] as S equal segments from `state` [B, S, n, D], all of them side by side.

    Writes into the trajectory and returns the state after each segment, [B, S, n, D]. A segment's numbers are the same
    to the bit whatever S is, as each row of D channels meets the same instructions.
    """
    cut = (state.shape[1], (tokens.stop - tokens.start) // state.shape[1])
    gates, acts, *states = (z[:, tokens].unflatten(1, cut) for z in (gates, into.acts, *into.states))
    advance = cell.stepper(weights, gates, acts, states)
    keep = [None] * cut[1] if restarts is None else restarts.at(tokens, cut[1])
    current: Sequence[Tensor] = state.unbind(2)
    for i, keep_i in enumerate(keep):
        if keep_i is not None:
            current = [z * keep_i for z in current]
        current = advance(i, current)
    return torch.stack(list(current), dim=2)
