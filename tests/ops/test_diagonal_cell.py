"""The solver of diagonal cells: a cell is its step, what is given by hand is what is derived, and small residuals,
chaos and overflow are not taken for solutions."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import Affine, Layout, diagonal_gru, diagonal_lstm
from ops.diagonal_cell import shooting
from ops.diagonal_cell.cell import DiagonalCell
from ops.diagonal_cell.chunked import ChunkedForm
from ops.diagonal_cell.shooting import Problem, Shooting, solve
from ops.diagonal_cell.statistics import Statistics
from ops.diagonal_gru.cell import GRU
from ops.diagonal_lstm.cell import LSTM
from tests.ops.cells import (
    derived,
    derived_lstm_form,
    gru_form,
    lstm_form,
    make_inputs,
    name_of,
    newton,
    run,
    tanh_form,
)
from tests.ops.compare import assert_equal, assert_split_equals_whole, error, evaluate, layouts, packed_positions


@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.parametrize("time", [1, 2, 17, 100, 257])
@pytest.mark.parametrize("form", [tanh_form, derived_lstm_form], ids=name_of)
def test_a_cell_is_its_step(form: ChunkedForm, time: int, segments: int) -> None:
    inputs = make_inputs(form, time)
    for layout in layouts(time).values():
        expected = evaluate(partial(run, form), inputs, layout=layout, impl="loop")
        found = evaluate(partial(run, form), inputs, layout=layout, impl="chunked", segments=segments)
        assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("segments", [1, 3])
def test_gradcheck(segments: int) -> None:
    leaves = [z.requires_grad_() for z in make_inputs(tanh_form, 11, width=2).values()]
    layout = Layout(packed_positions(11, first=2, cuts=(4, 5)))
    assert torch.autograd.gradcheck(lambda g, w, s: tanh_form(g, w, layout, s, segments=segments), leaves)


@pytest.mark.parametrize("cell", [LSTM, GRU], ids=lambda cell: cell.name)
def test_given_and_derived_jacobians_agree(cell: DiagonalCell) -> None:
    gates = torch.randn(2, 40, cell.num_gates, 5, dtype=torch.float64)
    weights = torch.randn(cell.num_weights, 5, dtype=torch.float64)
    initial = torch.randn(2, cell.num_states, 5, dtype=torch.float64)
    trajectory, _ = solve(Problem(cell, weights, gates, initial, None), Shooting(1, 0.0, 0))
    before = trajectory.before(slice(0, 40))
    cotangent = torch.randn(2, 40, cell.num_states, 5, dtype=torch.float64)
    results = []
    for one in (cell, derived(cell)):
        jacobian, pullback = one.linearise(weights, gates, trajectory.acts, before, trajectory.states)
        dgates, dweights = torch.empty_like(gates), torch.zeros_like(weights)
        pullback(cotangent, dgates, dweights)
        results.append({"jacobian": jacobian, "dgates": dgates, "dweights": dweights})
    assert_equal(*results, 1e-13)


def test_gradients_of_one_output_alone() -> None:
    """Of the output or of the last state; the other's is then not given."""
    inputs = [z.requires_grad_() for z in make_inputs(lstm_form, 20).values()]
    y, state = lstm_form(inputs[0], inputs[1], None, inputs[2])
    both = torch.autograd.grad(y.sum() + state.sum(), inputs, retain_graph=True)
    alone = [torch.autograd.grad(z.sum(), inputs, retain_graph=True) for z in (y, state)]
    assert all(error(a + b, c) <= 1e-14 for a, b, c in zip(*alone, both))


@pytest.mark.parametrize(
    ("form", "weight"), [*((lstm_form, i) for i in range(5)), *((gru_form, i) for i in range(3))], ids=name_of
)
def test_a_dropped_gradient_term_is_caught(form: ChunkedForm, weight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the states through each of the weights."""
    inputs, linearise = make_inputs(form, 65), form.cell.linearise

    def dropped(weights: Tensor, *args: Any) -> Any:
        weights = weights.clone()
        weights[weight] = 0
        return linearise(weights, *args)

    expected = evaluate(partial(run, form), inputs, layout=None, impl="loop")
    assert_equal(evaluate(partial(run, form), inputs, layout=None, impl="chunked"), expected, 1e-12)
    monkeypatch.setattr(form.cell, "linearise", dropped)
    with pytest.raises(AssertionError):
        assert_equal(evaluate(partial(run, form), inputs, layout=None, impl="chunked"), expected, 1e-4)


@pytest.mark.parametrize("form", [lstm_form, gru_form], ids=name_of)
def test_a_dropped_state_is_caught(form: ChunkedForm) -> None:
    def without(state: Tensor | None, *, impl: str, gates: Tensor, weight: Tensor, layout: None) -> Any:
        return form(gates, weight, layout, state if impl == "chunked" else None)

    inputs = make_inputs(form, 65)
    kept = {"gates": inputs["gates"], "weight": inputs["weights"]}
    split = partial(assert_split_equals_whole, without, kept, cuts=(16, 33), tolerance=1e-12, layout=None)
    split(impl="chunked")
    with pytest.raises(AssertionError):
        split(impl="chunked with its states dropped")


@pytest.mark.parametrize(("op", "cell"), [(diagonal_lstm, LSTM), (diagonal_gru, GRU)], ids=["lstm", "gru"])
def test_wild_weights_give_the_sequential_result_where_three_newton_iterations_do_not(op: Any, cell: Any) -> None:
    """Weights from N(0, 4), in fp32; many Newton iterations get there, so that it is the three that do not suffice."""
    gates, weights = torch.randn(2, 256, 3, 64), 2 * torch.randn(cell.num_weights, 64)
    parts = (weights[:3], weights[3:]) if cell is LSTM else (weights,)
    expected, _ = op(gates, *parts, segments=1)
    statistics = Statistics()
    found, _ = op(gates, *parts, segments=16, statistics=statistics)
    assert (found - expected).abs().max() <= 2e-6
    assert statistics.sequential_channels > 0
    assert not (newton(cell, gates, weights, 3) - expected).abs().max() <= 0.1
    exact = newton(cell, gates[:, :16].double(), weights.double(), 16)
    assert (exact - op(gates[:, :16].double(), *(z.double() for z in parts), impl="reference")[0]).abs().max() <= 1e-9


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.5, 1.5, 5.0, 20.0])
@pytest.mark.parametrize(("op", "count"), [(diagonal_lstm, 5), (diagonal_gru, 3)], ids=["lstm", "gru"])
def test_whatever_the_weights_the_loop_is_found(op: Any, count: int, spread: float, scale: float) -> None:
    """In fp32: starts of segments err by 1e-6 at most, which little grows inside of segments; most are exact."""
    gates, weights = scale * torch.randn(4, 256, 3, 32), spread * torch.randn(count, 32)
    parts = (weights[:3], weights[3:]) if op is diagonal_lstm else (weights,)
    expected, _ = op(gates, *parts, segments=1)
    for segments in (4, 16):
        found, _ = op(gates, *parts, segments=segments)
        assert (found - expected).abs().max() <= 5e-6


def test_newton_for_each_token_converges_with_more_iterations() -> None:
    """From any state, too."""
    gates, weights, state = make_inputs(lstm_form, 12).values()
    expected, _ = run(lstm_form, impl="loop", gates=gates, weights=weights, initial_state=state, layout=None)
    assert error(newton(LSTM, gates, weights, 12, initial=state), expected) < 1e-12


def test_a_small_residual_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of 1e-8 that doubles with every token: nothing where the first segment ends, and near 1 at last."""
    gates = torch.zeros(1, 64, 1, 8)
    gates[:, 0] = 1e-8
    weights, statistics = torch.full((1, 8), 2.0), Statistics()
    expected, _ = tanh_form(gates, weights, None, None, segments=1)
    assert expected[:, -1].min() > 0.9
    found, _ = tanh_form(gates, weights, None, None, segments=16, statistics=statistics)
    assert (found - expected).abs().max() <= 1e-6
    monkeypatch.setattr(shooting, "_start_errors", lambda residual, _: residual.abs().amax((1, 2)))
    trusting, _ = tanh_form(gates, weights, None, None, segments=16)
    assert trusting[:, -1].max() < 1e-3


@pytest.mark.parametrize("form", [lstm_form, gru_form], ids=name_of)
def test_the_residual_tells_how_far_the_states_are_from_the_loop(form: ChunkedForm) -> None:
    """Of memories of fifty tokens, at three tolerances."""
    inputs, statistics = make_inputs(form, 512, width=64), Statistics()
    gates, weights, state = inputs["gates"], 0.1 * inputs["weights"], inputs["initial_state"]
    gates[:, :, 0] += 4 if form is lstm_form else -4
    expected, _ = form(gates, weights, None, state, segments=1)
    shot = partial(form, segments=32, max_corrections=6, statistics=statistics)
    for tolerance in (1e-2, 1e-5, 1e-10):
        found, _ = shot(gates, weights, None, state, tolerance=tolerance)
        assert statistics.sequential_channels == 0
        distance = float((found - expected).abs().max())
        assert statistics.residual <= tolerance
        assert statistics.residual / 4 <= distance <= 1.5 * statistics.residual


def test_products_that_overflow_are_not_used() -> None:
    """Jacobians of 1e10 at a state of zero, where all guesses stand."""
    gates, weights = torch.zeros(2, 128, 1, 8), torch.full((1, 8), 1e10)
    state, statistics = torch.full((2, 1, 8), -1e-3), Statistics()
    leaves = [z.requires_grad_() for z in (gates, weights, state)]
    for layout in (None, Layout(packed_positions(128, first=7))):
        y, last = tanh_form(gates, weights, layout, state, segments=8, max_corrections=2, statistics=statistics)
        expected, _ = tanh_form(gates, weights, layout, state, segments=1)
        assert y.equal(expected)
        assert statistics.sequential_channels == (16 if layout is None else 8)
        if layout is None:  # where a document starts the state stays at zero, and gradients of 1e1280 are right
            grads = torch.autograd.grad(y.sum() + last.sum(), leaves)
            assert all(z.isfinite().all() for z in grads)
    summary = tanh_form.summary(gates, weights, None, None)
    assert summary.transition.equal(torch.zeros(2, 1, 1, 8))
    assert isinstance(summary, Affine)
    assert summary.offset.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(
    form=st.sampled_from([gru_form, lstm_form]),
    seed=st.integers(0, 99),
    time=st.integers(1, 90),
    segments=st.integers(1, 9),
    cut=st.integers(0, 89),
)
def test_any_order_of_rows_and_any_split(form: ChunkedForm, seed: int, time: int, segments: int, cut: int) -> None:
    torch.manual_seed(seed)
    inputs, positions = make_inputs(form, time, width=2), packed_positions(time, first=3)
    gates, weights, state = inputs.values()
    y, last = form(gates, weights, Layout(positions), state, segments=segments)
    swapped = form(gates.flip(0), weights, Layout(positions.flip(0)), state.flip(0), segments=segments)
    assert max(error(a.flip(0), b) for a, b in zip(swapped, (y, last))) <= 1e-12
    if 0 < cut < time:
        first, state = form(gates[:, :cut], weights, Layout(positions[:, :cut]), state, segments=segments)
        rest, state = form(gates[:, cut:], weights, Layout(positions[:, cut:]), state, segments=segments)
        assert max(error(torch.cat([first, rest], dim=1), y), error(state, last)) <= 1e-12
