"""The forward recurrence over given tokens, for any number of segments side by side, and its Jacobians."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Cell(NamedTuple):
    """The recurrent weights a [3, D] and peepholes c [2, D] of `ops.diagonal_lstm`."""

    a: Tensor
    c: Tensor


@dataclass(frozen=True)
class Restarts:
    """Where documents start.

    Attributes:
        keep: [B, T, 1] or [B, T, D], 0 where a document starts, else 1, in the dtype of the recurrence.
        steps: T booleans, False where no row starts a document; all True where reading them would synchronise.
    """

    keep: Tensor
    steps: list[bool]

    @classmethod
    def of(cls, starts: Tensor, dtype: torch.dtype) -> "Restarts":
        """From bool [B, T] or [B, T, D]."""
        keep = (~starts).to(dtype)
        if starts.device.type != "cpu":
            return cls(keep, [True] * starts.shape[1])
        return cls(keep, starts.transpose(0, 1).flatten(1).any(1).tolist())

    def any(self, tokens: slice) -> bool:
        return any(self.steps[tokens])

    def at(self, tokens: slice, length: int) -> list[Tensor | None]:
        """For each step of segments of `length` cut from `tokens`, [B, S, 1 or D], None where no document starts."""
        keep, steps = self.keep[:, tokens], self.steps[tokens]
        return [keep[:, i::length] if any(steps[i::length]) else None for i in range(length)]


@dataclass(frozen=True)
class Trajectory:
    """All that the backward pass needs of a forward one.

    Attributes:
        acts: [B, T, 4, D], what the nonlinearities gave: forget f, output o, candidate z, and the tanh of the cell.
        cells, hiddens: [B, T + 1, D]; entry t + 1 belongs to token t, entry 0 is the initial state.
    """

    acts: Tensor
    cells: Tensor
    hiddens: Tensor

    @classmethod
    def starting(cls, state: Tensor, time: int) -> "Trajectory":
        """Empty but for the initial state [B, 2, D]."""
        batch, _, width = state.shape
        trajectory = cls(
            state.new_empty(batch, time, 4, width),
            state.new_empty(batch, time + 1, width),
            state.new_empty(batch, time + 1, width),
        )
        trajectory.cells[:, 0], trajectory.hiddens[:, 0] = state.unbind(1)
        return trajectory

    def state(self, token: int) -> Tensor:
        """[B, 2, D] after `token`; -1 for the initial one."""
        return torch.stack([self.cells[:, token + 1], self.hiddens[:, token + 1]], dim=1)


def run(gates: Tensor, cell: Cell, state: Tensor, restarts: Restarts | None, tokens: slice, into: Trajectory) -> Tensor:
    """Run `tokens` of gates [B, T, 3, D] as S equal segments from `state` [B, S, 2, D], all of them side by side.

    Writes into the trajectory and returns the state after each segment, [B, S, 2, D]. A segment's numbers are the same
    to the bit whatever S is, where D is a multiple of what a vector instruction takes.
    """
    segments = state.shape[1]
    length = (tokens.stop - tokens.start) // segments
    after = slice(tokens.start + 1, tokens.stop + 1)
    cut = (segments, length)
    steps = [
        z.unflatten(1, cut).unbind(2)
        for z in (gates[:, tokens], into.acts[:, tokens, :3], into.cells[:, after], into.hiddens[:, after])
    ]
    f, o, z, tanh_cell = (x.unbind(2) for x in into.acts[:, tokens].unflatten(1, cut).unbind(3))
    keep = None if restarts is None else restarts.at(tokens, length)
    c_f, c_o = cell.c
    previous, h = state.unbind(2)
    for i, (gates_t, acts_t, cell_t, h_t) in enumerate(zip(*steps)):
        if keep is not None and (keep_t := keep[i]) is not None:
            previous, h = previous * keep_t, h * keep_t
        torch.addcmul(gates_t, cell.a, h.unsqueeze(2), out=acts_t)
        f[i].addcmul_(c_f, previous).sigmoid_()
        z[i].tanh_()
        torch.lerp(z[i], previous, f[i], out=cell_t)
        o[i].addcmul_(c_o, cell_t).sigmoid_()
        torch.mul(o[i], torch.tanh(cell_t, out=tanh_cell[i]), out=h_t)
        previous, h = cell_t, h_t
    return torch.stack([previous, h], dim=2)


class Slopes(NamedTuple):
    """Partial derivatives within one step, [..., D] each."""

    forget: Tensor  # of the cell by the forget gate's pre-activation
    candidate: Tensor  # of the cell by the candidate's
    output: Tensor  # of h by the output gate's
    hidden: Tensor  # of h by the cell, through tanh and the peephole


def slopes(cell: Cell, acts: Tensor, previous: Tensor) -> Slopes:
    """acts [..., 4, D]; previous [..., D], the cell before the step, 0 at a document's start."""
    f, o, z, tanh_cell = acts.unbind(-2)
    output = (1 - o).mul_(o)
    hidden = torch.addcmul(o, o.mul(tanh_cell), tanh_cell, value=-1)  # o (1 - tanh^2)
    output.mul_(tanh_cell)
    hidden.addcmul_(output, cell.c[1])
    remaining = 1 - f
    forget = torch.sub(previous, z).mul_(f).mul_(remaining)
    candidate = torch.addcmul(remaining, remaining * z, z, value=-1)
    return Slopes(forget, candidate, output, hidden)


def jacobians(cell: Cell, acts: Tensor, slope: Slopes) -> Tensor:
    """[..., 2, 2, D]: of (cell, hidden) after a step by (cell, hidden) before it, were there no restart."""
    (a_f, a_o, a_z), (c_f, _) = cell
    jacobian = acts.new_empty(*slope.forget.shape[:-1], 2, 2, acts.shape[-1])
    cell_by, hidden_by = jacobian.unbind(-3)
    by_cell, by_hidden = cell_by.unbind(-2)
    torch.addcmul(acts.select(-2, 0), slope.forget, c_f, out=by_cell)
    torch.mul(slope.forget, a_f, out=by_hidden).addcmul_(slope.candidate, a_z)
    torch.mul(cell_by, slope.hidden.unsqueeze(-2), out=hidden_by)
    hidden_by.select(-2, 1).addcmul_(slope.output, a_o)
    return jacobian
