"""The LSTM cell: its step, and by hand what the solver needs of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops.diagonal_cell.cell import Advance, Channels, DiagonalCell, Linearised


def step(state: Channels, gates: Channels, weights: Channels) -> Channels:
    """(cell, h) -> (cell, h); equations in `ops.diagonal_lstm`, weights are its a above its c."""
    (cell, h), (gate_f, gate_o, gate_z), (a_f, a_o, a_z, c_f, c_o) = state, gates, weights
    f = torch.sigmoid(a_f * h + gate_f + c_f * cell)
    z = torch.tanh(a_z * h + gate_z)
    cell = f * cell + (1 - f) * z
    o = torch.sigmoid(a_o * h + gate_o + c_o * cell)
    return cell, o * torch.tanh(cell)


class LSTMCell(DiagonalCell):
    """Acts are what the nonlinearities gave: forget f, output o, candidate z, and the tanh of the cell."""

    num_acts = 4

    def bound(self, state: Tensor) -> Tensor:
        """A cell is a mean of tanh values and its start; h is a product of a sigmoid and a tanh."""
        cell = state[:, 0].abs().clamp_min(1)
        return torch.stack([cell, torch.ones_like(cell)], dim=1)

    def stepper(self, weights: Tensor, gates: Tensor, acts: Tensor, states: Sequence[Tensor]) -> Advance:
        a, (c_f, c_o) = weights[:3], weights[3:]
        gate_steps, pre = gates.unbind(2), acts[..., :3, :].unbind(2)
        f, o, z, tanh_cell = (x.unbind(2) for x in acts.unbind(3))
        cells, hiddens = (x.unbind(2) for x in states)

        def advance(i: int, state: Channels) -> Channels:
            previous, h = state
            torch.addcmul(gate_steps[i], a, h.unsqueeze(2), out=pre[i])
            f[i].addcmul_(c_f, previous).sigmoid_()
            z[i].tanh_()
            cell = torch.lerp(z[i], previous, f[i], out=cells[i])
            o[i].addcmul_(c_o, cell).sigmoid_()
            return cell, torch.mul(o[i], torch.tanh(cell, out=tanh_cell[i]), out=hiddens[i])

        return advance

    def linearise(
        self, weights: Tensor, gates: Tensor | None, acts: Tensor, before: Channels, after: Channels
    ) -> Linearised:
        (previous, h), (cell, _) = before, after
        slope = slopes(weights, acts, previous)

        def pullback(dstates: Tensor, dgates: Tensor, dweights: Tensor) -> None:
            dcell, dhidden = dstates.unbind(-2)
            dcell = torch.addcmul(dcell, slope.hidden, dhidden)
            by_forget, by_output, by_candidate = dgates.unbind(-2)
            torch.mul(dcell, slope.forget, out=by_forget)
            torch.mul(dhidden, slope.output, out=by_output)
            torch.mul(dcell, slope.candidate, out=by_candidate)
            dweights[:3] += (dgates * h.unsqueeze(-2)).flatten(0, -3).sum(0)
            dweights[3] += (by_forget * previous).flatten(0, -2).sum(0)
            dweights[4] += (by_output * cell).flatten(0, -2).sum(0)

        return Linearised(_jacobian(weights, acts, slope), pullback)


class Slopes(NamedTuple):
    """Partial derivatives within one step, [..., D] each."""

    forget: Tensor  # of the cell by the forget gate's pre-activation
    candidate: Tensor  # of the cell by the candidate's
    output: Tensor  # of h by the output gate's
    hidden: Tensor  # of h by the cell, through tanh and the peephole


def slopes(weights: Tensor, acts: Tensor, previous: Tensor) -> Slopes:
    """acts [..., 4, D]; previous [..., D], the cell before the step, 0 at a document's start."""
    f, o, z, tanh_cell = acts.unbind(-2)
    output = (1 - o).mul_(o)
    hidden = torch.addcmul(o, o.mul(tanh_cell), tanh_cell, value=-1)  # o (1 - tanh^2)
    output.mul_(tanh_cell)
    hidden.addcmul_(output, weights[4])
    remaining = 1 - f
    forget = torch.sub(previous, z).mul_(f).mul_(remaining)
    candidate = torch.addcmul(remaining, remaining * z, z, value=-1)
    return Slopes(forget, candidate, output, hidden)


def _jacobian(weights: Tensor, acts: Tensor, slope: Slopes) -> Tensor:
    """[..., 2, 2, D]: of (cell, hidden) after a step by (cell, hidden) before it."""
    a_f, a_o, a_z, c_f, _ = weights
    jacobian = acts.new_empty(*slope.forget.shape[:-1], 2, 2, acts.shape[-1])
    cell_by, hidden_by = jacobian.unbind(-3)
    by_cell, by_hidden = cell_by.unbind(-2)
    torch.addcmul(acts.select(-2, 0), slope.forget, c_f, out=by_cell)
    torch.mul(slope.forget, a_f, out=by_hidden).addcmul_(slope.candidate, a_z)
    torch.mul(cell_by, slope.hidden.unsqueeze(-2), out=hidden_by)
    hidden_by.select(-2, 1).addcmul_(slope.output, a_o)
    return jacobian


LSTM = LSTMCell("diagonal_lstm", step, states=2, gates=3, weights=5, output=1)
