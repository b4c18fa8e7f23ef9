"""The registered ops of diagonal cells: what torch.compile and activation checkpointing need, and their report."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops import Layout, diagonal_gru
from ops.diagonal_cell.chunked import ChunkedForm
from ops.diagonal_cell.statistics import Statistics
from tests.ops.cells import gru_form, lstm_form, make_inputs, name_of, tanh_form
from tests.ops.compare import error, packed_positions

every_form = pytest.mark.parametrize(
    "form", [pytest.param(tanh_form, marks=pytest.mark.slow), lstm_form, gru_form], ids=name_of
)


@every_form
def test_compiles_to_one_graph(form: ChunkedForm) -> None:
    """Forward and backward, with documents and a report, at two lengths."""
    statistics = Statistics()
    torch.compiler.reset()

    def loss(gates: Tensor, weights: Tensor, state: Tensor, layout: Layout) -> Tensor:
        y, last = form(gates, weights, layout, state, segments=4, statistics=statistics)
        return y.sin().sum() + last.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for time in (40, 41):
        inputs, layout = list(make_inputs(form, time).values()), Layout(packed_positions(time))
        expected = gradients(loss, inputs, layout)
        eager, statistics.report = statistics.report, None
        assert all(error(a, b) <= 1e-14 for a, b in zip(gradients(compiled, inputs, layout), expected))
        assert statistics.report is not None
        assert statistics.report.equal(eager)
        assert not statistics.report.requires_grad


@every_form
def test_passes_activation_checkpointing(form: ChunkedForm) -> None:
    inputs, layout = list(make_inputs(form, 40).values()), Layout(packed_positions(40))

    def loss(gates: Tensor, weights: Tensor, state: Tensor) -> Tensor:
        y, last = form(gates.tanh(), weights, layout, state, segments=4)
        return y.sin().sum() + last.square().sum()

    repeated = gradients(lambda *z: checkpoint(loss, *z, use_reentrant=False), inputs)
    assert all(a.equal(b) for a, b in zip(repeated, gradients(loss, inputs)))


def gradients(loss: Callable[..., Tensor], inputs: list[Tensor], *others: Any) -> list[Tensor]:
    leaves = [z.detach().requires_grad_() for z in inputs]
    return list(torch.autograd.grad(loss(*leaves, *others), leaves))


@every_form
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_registered_ops_are_sound(form: ChunkedForm, packed: bool) -> None:
    leaves = [z.requires_grad_() for z in make_inputs(form, 9).values()]
    starts = packed_positions(9, first=2) == 0 if packed else None
    torch.library.opcheck(form.ops.forward, (*leaves, starts, 3, None, None))
    torch.library.opcheck(form.ops.summary, (*leaves, starts))
    gates, weights, initial = (z.detach() for z in leaves)
    y, state, _, acts, *others = form.ops.forward(gates, weights, initial, starts, 3, None, None)
    others.insert(form.cell.output, y)
    kept = gates if form.cell.needs_gates else None
    torch.library.opcheck(form.ops.backward, (y.cos(), state.cos(), weights, initial, starts, kept, acts, others))


def test_reading_statistics_is_what_waits_for_the_device() -> None:
    """A call leaves a tensor behind; figures are read from it on demand, and the reference has none to tell."""
    inputs, statistics = make_inputs(gru_form, 100), Statistics()
    gates, a, state = inputs.values()
    diagonal_gru(gates, a, initial_state=state, segments=4, statistics=statistics)
    assert isinstance(statistics.report, Tensor)
    assert not statistics.report.requires_grad
    assert statistics.segments == 4
    assert 1 <= statistics.corrections <= 3
    diagonal_gru(gates, a, initial_state=state, impl="reference", statistics=statistics)
    assert (statistics.report, statistics.segments, statistics.corrections) == (None, 1, 0)
