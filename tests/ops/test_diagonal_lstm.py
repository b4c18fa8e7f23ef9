"""diagonal_lstm: the time loop against the paper's equations, multiple shooting and its backward against the loop."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import Layout, diagonal_lstm
from ops.diagonal_cell import shooting
from ops.diagonal_cell.defaults import default_segments
from ops.diagonal_cell.statistics import Statistics
from ops.diagonal_cell.trajectory import Restarts
from tests.ops.compare import (
    Inputs,
    assert_earned,
    assert_equal,
    assert_packed_equals_separate,
    assert_split_equals_whole,
    evaluate,
    layouts,
    packed_positions,
)
from tests.ops.documents import assert_equals_reference, positions

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 257)
lstm = partial(diagonal_lstm, output_final_state=True)


def lstm_of(weight: Tensor, *, state: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The op under the names that the shared tests know: `weight` [5, D] is a above c, `state` the initial one."""
    return lstm(a=weight[:3], c=weight[3:], initial_state=state, **arguments)


def make_inputs(
    time: int, *, batch: int = 2, width: int = 5, spread: float = 0.5, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Recurrent and peephole weights from N(0, spread^2)."""
    return {
        "gates": torch.randn(batch, time, 3, width, dtype=dtype),
        "a": spread * torch.randn(3, width, dtype=dtype),
        "c": spread * torch.randn(2, width, dtype=dtype),
        "initial_state": torch.randn(batch, 2, width, dtype=dtype),
    }


def without_state(inputs: Inputs) -> Inputs:
    return {"gates": inputs["gates"][:1], "weight": torch.cat([inputs["a"], inputs["c"]])}


def paper(gates: Tensor, a: Tensor, c: Tensor, initial_state: Tensor, *, layout: Layout) -> tuple[Tensor, Tensor]:
    """Equation 3.1 of arXiv 2510.21450, row by row and document by document, in its order and by autograd alone."""
    rows, states = [], []
    for b in range(gates.shape[0]):
        cell, h = initial_state[b, 0], initial_state[b, 1]
        outputs = []
        for t in range(gates.shape[1]):
            if layout.positions[b, t] == 0:
                cell, h = torch.zeros_like(cell), torch.zeros_like(h)
            f = 1 / (1 + torch.exp(-(a[0] * h + gates[b, t, 0] + c[0] * cell)))
            z = torch.tanh(a[2] * h + gates[b, t, 2])
            cell = f * cell + (1 - f) * z
            o = 1 / (1 + torch.exp(-(a[1] * h + gates[b, t, 1] + c[1] * cell)))
            h = o * torch.tanh(cell)
            outputs.append(h)
        rows.append(torch.stack(outputs))
        states.append(torch.stack([cell, h]))
    return torch.stack(rows), torch.stack(states)


@pytest.mark.parametrize("kind", ["packed", "continued"])
def test_reference_is_the_paper(kind: str) -> None:
    inputs, layout = make_inputs(50, spread=1.0), layouts(50)[kind]
    assert_equal(evaluate(lstm, inputs, layout=layout, impl="reference"), evaluate(paper, inputs, layout=layout), 1e-13)


@pytest.mark.parametrize("segments", [1, 5, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 16))])
@pytest.mark.parametrize("time", LENGTHS)
def test_chunked_equals_reference(time: int, segments: int) -> None:
    inputs = make_inputs(time, spread=1.0)
    for layout in layouts(time).values():
        expected = evaluate(lstm, inputs, layout=layout, impl="reference")
        assert_equal(evaluate(lstm, inputs, layout=layout, impl="chunked", segments=segments), expected, 1e-12)


def test_chosen_segments_equal_reference() -> None:
    inputs, layout, statistics = make_inputs(1100), Layout(packed_positions(1100)), Statistics()
    expected = evaluate(lstm, inputs, layout=layout, impl="reference")
    assert_equal(evaluate(lstm, inputs, layout=layout, statistics=statistics), expected, 1e-12)
    assert statistics.segments == 16


@pytest.mark.parametrize("time", [*LENGTHS, pytest.param(1025, marks=pytest.mark.slow)])
def test_fp32_error_is_earned(time: int) -> None:
    layout, inputs = Layout(packed_positions(time, first=7)), make_inputs(time, width=64)
    assert_earned(lstm, inputs, layout=layout)
    if time > 60:  # a state at the border of shorter segments may err by the tolerance and be much of the output
        assert_earned(partial(lstm_shot, segments=6), inputs, layout=layout)


def lstm_shot(*, impl: str, segments: int, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    return lstm(impl=impl, segments=segments if impl == "chunked" else None, **arguments)


@settings(max_examples=25, deadline=None)
@given(row=positions(150), seed=st.integers(0, 99), segments=st.integers(1, 20))
def test_any_documents(row: list[int], seed: int, segments: int) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(len(row), batch=1, width=2)
    options = {"segments": segments, "tolerance": 0.0, "max_corrections": segments}  # or starts err by the tolerance
    assert_equals_reference(lstm, inputs, row, impl="chunked", **options)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("time", [1, 3, 11])
def test_gradcheck(time: int, segments: int) -> None:
    inputs = make_inputs(time, batch=1, width=2, spread=1.0)
    layout = Layout(packed_positions(time, first=2, cuts=(4, 5))[:1])
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def run(gates: Tensor, a: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        return lstm(gates, a, c, initial_state=state, layout=layout, impl="chunked", segments=segments)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_all_corrections_give_the_sequential_loop_to_the_bit(spread: float, kind: str) -> None:
    """Also for chaotic channels; with a width that vector instructions divide, so that all take the same ones."""
    inputs, layout = make_inputs(320, width=64, spread=spread, dtype=torch.float32), layouts(320)[kind]
    statistics = Statistics()
    expected = evaluate(lstm, inputs, layout=layout, impl="chunked", segments=1)
    for segments in (2, 5, 16):
        shot = partial(lstm, tolerance=0.0, max_corrections=segments - 1, statistics=statistics)
        assert_equal(evaluate(shot, inputs, layout=layout, impl="chunked", segments=segments), expected, 0.0)
        assert (statistics.residual, statistics.sequential_channels) == (0.0, 0)


@pytest.mark.parametrize(("bias", "most"), [(0.0, 2), (4.0, 3)])
def test_trainable_weights_need_few_corrections(bias: float, most: int) -> None:
    """Weights of norm 0.5, and memories of two tokens or of fifty."""
    inputs, statistics = clipped_inputs(bias), Statistics()
    for segments in (4, 16, 64):
        lstm(**inputs, segments=segments, statistics=statistics)
        assert statistics.segments == segments
        assert 1 <= statistics.corrections <= most
        assert statistics.residual <= 1e-6
        assert statistics.sequential_channels == 0


def test_corrections_without_jacobians_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, statistics = clipped_inputs(4.0), Statistics()
    monkeypatch.setattr(shooting, "segment_products", lambda *_: torch.zeros(1, 64, 2, 2, 64))
    lstm(**inputs, segments=64, statistics=statistics)
    assert statistics.sequential_channels > 0


def clipped_inputs(bias: float) -> Inputs:
    """Each vector of recurrent and peephole weights has the norm 0.5; `bias` is the forget gates'."""
    inputs = make_inputs(2048, batch=1, width=64, dtype=torch.float32)
    inputs["gates"][:, :, 0] += bias
    for name in ("a", "c"):
        inputs[name] *= 0.5 / inputs[name].norm(dim=1, keepdim=True)
    return inputs


def test_channels_that_do_not_converge_are_solved_sequentially(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, layout = make_inputs(400, width=64, spread=2.0), Layout(packed_positions(400))
    statistics = Statistics()
    shot = partial(lstm, layout=layout, impl="chunked", segments=16, max_corrections=2, statistics=statistics)
    expected = evaluate(lstm, inputs, layout=layout, impl="chunked", segments=1)
    assert_equal(evaluate(shot, inputs), expected, 1e-8)
    assert 0 < statistics.sequential_channels < 2 * 64
    assert statistics.residual <= 1e-13
    assert statistics.corrections == 2
    monkeypatch.setattr(shooting, "_solve_sequentially", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_equal(evaluate(shot, inputs), expected, 1e-8)


@pytest.mark.parametrize("segments", [1, 16])
def test_saturated_gates_and_wild_weights_give_no_nan(segments: int) -> None:
    """In fp32, with weights from N(0, 4) and gates of 1e4 beside ordinary ones; |h| <= 1 and |cell| within reach."""
    inputs = make_inputs(333, width=64, spread=2.0, dtype=torch.float32)
    inputs["gates"][..., ::2] *= 1e4
    inputs["gates"][..., ::8] = 0.0
    inputs["initial_state"] *= 100
    for layout in layouts(333).values():
        results = evaluate(lstm, inputs, layout=layout, impl="chunked", segments=segments)
        assert all(tensor.isfinite().all() for tensor in results.values())
        assert results["output"].abs().max() <= 1


@pytest.mark.parametrize(("impl", "segments"), [("reference", None), ("chunked", 1), ("chunked", 7)])
def test_packed_equals_separate(impl: str, segments: int | None) -> None:
    op = partial(lstm_of, segments=segments)
    assert_packed_equals_separate(op, without_state(make_inputs(260)), impl=impl, tolerance=1e-12)


@pytest.mark.parametrize("name", ["of", "within"], ids=["everywhere", "backward"])
def test_a_dropped_reset_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restarts, name, lambda *_: None)
    with pytest.raises(AssertionError):
        assert_packed_equals_separate(lstm_of, without_state(make_inputs(260)), impl="chunked", tolerance=1e-12)


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("cuts", [(1,), (33,), (32, 64, 65, 96)])
def test_split_equals_whole(cuts: tuple[int, ...], kind: str) -> None:
    inputs, layout = without_state(make_inputs(129)), Layout(packed_positions(129)[:1]) if kind == "packed" else None
    for segments in (1, 8):
        op = partial(lstm_of, segments=segments)
        assert_split_equals_whole(op, inputs, cuts=cuts, impl="chunked", tolerance=1e-12, layout=layout)


@pytest.mark.parametrize(("impl", "segments"), [("reference", None), ("chunked", 1), ("chunked", 8)])
def test_bf16_is_rounded_only_at_the_end(impl: str, segments: int | None) -> None:
    inputs = make_inputs(257, width=8, dtype=torch.float32)
    gates = inputs.pop("gates").bfloat16().requires_grad_()
    inputs["a"].requires_grad_()
    y, state = lstm(gates, **inputs, impl=impl, segments=segments)
    exact, exact_state = lstm(gates.double(), **{k: z.double() for k, z in inputs.items()}, impl="reference")
    assert state is not None
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    dgates, da = torch.autograd.grad(y.float().sum() + state.sum(), (gates, inputs["a"]))
    assert (dgates.dtype, da.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(65, dtype=torch.float32)
    for impl, segments in (("reference", None), ("chunked", 8)):
        expected = evaluate(lstm, inputs, impl=impl, segments=segments)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(evaluate(lstm, inputs, impl=impl, segments=segments), expected, 0.0)


def test_strided_inputs() -> None:
    inputs = make_inputs(65)
    strided = {
        "gates": inputs["gates"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "a": inputs["a"].T.contiguous().T,
        "c": torch.cat([inputs["c"]] * 2, dim=1)[:, :5],
        "initial_state": inputs["initial_state"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    for segments in (1, 8):
        expected = evaluate(lstm, inputs, impl="chunked", segments=segments)
        assert_equal(evaluate(lstm, strided, impl="chunked", segments=segments), expected, 1e-15)


def test_no_final_state_unless_asked() -> None:
    assert diagonal_lstm(**make_inputs(3))[1] is None


def test_segments_follow_the_size() -> None:
    assert default_segments(4, 2048, 256, "cpu") == 1
    assert default_segments(1, 2048, 64, "cpu") == 32
    assert default_segments(2, 2048, 256, "cpu") == 16
    assert default_segments(1, 100, 64, "cpu") == 1
    assert default_segments(8, 4096, 2048, "cuda") == 64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gates": torch.zeros(2, 3, 5)}, r"gates has shape \[2, 3, 5\]; must be \[B, T, 3, D\]"),
        ({"gates": torch.zeros(2, 3, 4, 5)}, r"gates has shape.*= \[2, 3, 3, 5\]"),
        ({"gates": torch.zeros(2, 0, 3, 5)}, "each size >= 1"),
        ({"a": torch.zeros(2, 5)}, r"a has shape \[2, 5\].*\[3, 5\]"),
        ({"c": torch.zeros(3, 5)}, r"c has shape \[3, 5\].*\[2, 5\]"),
        ({"initial_state": torch.zeros(2, 5)}, r"initial_state has shape.*\[B, 2, D\]"),
        ({"a": torch.zeros(3, 5, dtype=torch.int64)}, "a has dtype torch.int64"),
        ({"layout": Layout(torch.arange(4).repeat(2, 1))}, "layout.positions"),
        ({"impl": "fla"}, "diagonal_lstm has no implementation 'fla'; choose one of auto, chunked, "),
        ({"segments": 0}, "segments is 0; must be >= 1"),
        ({"max_corrections": -1}, "max_corrections is -1; must be >= 0"),
        ({"segments": 2, "impl": "reference"}, "has no segments: leave segments out"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3, dtype=torch.float32) | wrong
    with pytest.raises(ValueError, match=message):
        diagonal_lstm(**arguments)
