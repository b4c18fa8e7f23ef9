"""Cells and what their tests share: forms of the library's and of cells that exist in tests alone, and a time loop."""

from typing import Any

import torch
from torch import Tensor

from ops.diagonal_cell.cell import Channels, DiagonalCell
from ops.diagonal_cell.chunked import ChunkedForm
from ops.diagonal_cell.derived import DerivedCell
from ops.diagonal_gru.chunked import form as gru_form
from ops.diagonal_lstm.cell import LSTM
from ops.diagonal_lstm.chunked import form as lstm_form
from tests.ops.compare import Inputs

__all__ = [
    "derived",
    "derived_lstm_form",
    "gru_form",
    "lstm_form",
    "make_inputs",
    "name_of",
    "newton",
    "run",
    "tanh_form",
]


def tanh_step(state: Channels, gates: Channels, weights: Channels) -> Channels:
    return (torch.tanh(weights[0] * state[0] + gates[0]),)


def derived(cell: DiagonalCell) -> DerivedCell:
    """The same cell with nothing given by hand."""
    return DerivedCell(
        f"derived_{cell.name}",
        cell.step,
        states=cell.num_states,
        gates=cell.num_gates,
        weights=cell.num_weights,
        output=cell.output,
    )


tanh_form = ChunkedForm(DerivedCell("tanh_rnn", tanh_step, states=1, gates=1, weights=1))
derived_lstm_form = ChunkedForm(derived(LSTM))


def run(form: ChunkedForm, *, impl: str, segments: int | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The form, or the time loop of its step by autograd alone."""
    gates, weights, state, layout = (inputs[name] for name in ("gates", "weights", "initial_state", "layout"))
    if impl == "chunked":
        return form(gates, weights, layout, state, segments=segments)
    outputs, current = [], state.unbind(1)
    for t in range(gates.shape[1]):
        if layout is not None:
            current = [z.masked_fill(layout.starts[:, t, None], 0) for z in current]
        current = form.cell.step(current, gates[:, t].unbind(1), weights.unbind(0))
        outputs.append(current[form.cell.output])
    return torch.stack(outputs, dim=1), torch.stack(list(current), dim=1)


def make_inputs(form: ChunkedForm, time: int, *, width: int = 3, dtype: torch.dtype = torch.float64) -> Inputs:
    cell = form.cell
    return {
        "gates": torch.randn(2, time, cell.num_gates, width, dtype=dtype),
        "weights": torch.randn(cell.num_weights, width, dtype=dtype),
        "initial_state": torch.randn(2, cell.num_states, width, dtype=dtype),
    }


def name_of(argument: Any) -> str:
    return argument.cell.name if isinstance(argument, ChunkedForm) else str(argument)


def newton(
    cell: DiagonalCell, gates: Tensor, weights: Tensor, iterations: int, *, initial: Tensor | None = None
) -> Tensor:
    """The output [B, T, D] of Newton's method for the states of all tokens at once, as ParaRNN (arXiv 2510.21450)
    publishes it: from each token's step on a state of zeros."""
    batch, time, _, width = gates.shape
    gate_rows, rows = gates.unbind(2), weights.unbind(0)
    first = gates.new_zeros(batch, cell.num_states, width) if initial is None else initial
    nothing = [torch.zeros_like(gate_rows[0])] * cell.num_states
    states = torch.stack(list(cell.step(nothing, gate_rows, rows)), dim=2)  # [B, T, n, D]
    for _ in range(iterations):
        before = torch.cat([first[:, None], states[:, :-1]], dim=1)
        after = torch.stack(list(cell.step(before.unbind(2), gate_rows, rows)), dim=2)
        acts = gates[:, :, :0]
        jacobian = derived(cell).linearise(weights, gates, acts, before.unbind(2), after.unbind(2)).jacobian
        solved = [first]
        for t in range(time):
            solved.append(after[:, t] + (jacobian[:, t] * (solved[-1] - before[:, t])[:, None]).sum(2))
        states = torch.stack(solved[1:], dim=1)
    return states[:, :, cell.output]
