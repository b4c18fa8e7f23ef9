"""diagonal_gru: the time loop against the paper's equations, multiple shooting and its backward against the loop.

torch.nn.GRUCell is no oracle: it applies the reset gate after the recurrent matrix, the paper before it.
"""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import Layout, diagonal_gru
from ops.diagonal_cell import shooting
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
gru = partial(diagonal_gru, output_final_state=True)


def gru_of(weight: Tensor, *, state: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The op under the names that the shared tests know: `weight` is a, `state` the initial one."""
    return gru(a=weight, initial_state=state, **arguments)


def gru_shot(*, impl: str, segments: int, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    return gru(impl=impl, segments=segments if impl == "chunked" else None, **arguments)


def make_inputs(
    time: int, *, batch: int = 2, width: int = 5, spread: float = 0.5, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Recurrent weights from N(0, spread^2)."""
    return {
        "gates": torch.randn(batch, time, 3, width, dtype=dtype),
        "a": spread * torch.randn(3, width, dtype=dtype),
        "initial_state": torch.randn(batch, 1, width, dtype=dtype),
    }


def without_state(inputs: Inputs) -> Inputs:
    return {"gates": inputs["gates"][:1], "weight": inputs["a"]}


def paper(gates: Tensor, a: Tensor, initial_state: Tensor, *, layout: Layout) -> tuple[Tensor, Tensor]:
    """The GRU of arXiv 2510.21450, equation 3.1, row by row and document by document, by autograd alone."""
    rows, states = [], []
    for b in range(gates.shape[0]):
        h = initial_state[b, 0]
        outputs = []
        for t in range(gates.shape[1]):
            if layout.positions[b, t] == 0:
                h = torch.zeros_like(h)
            z = 1 / (1 + torch.exp(-(a[0] * h + gates[b, t, 0])))
            r = 1 / (1 + torch.exp(-(a[1] * h + gates[b, t, 1])))
            candidate = torch.tanh(a[2] * (h * r) + gates[b, t, 2])
            h = h - z * h + z * candidate
            outputs.append(h)
        rows.append(torch.stack(outputs))
        states.append(h[None])
    return torch.stack(rows), torch.stack(states)


@pytest.mark.parametrize("kind", ["packed", "continued"])
def test_reference_is_the_paper(kind: str) -> None:
    inputs, layout = make_inputs(50, spread=1.0), layouts(50)[kind]
    assert_equal(evaluate(gru, inputs, layout=layout, impl="reference"), evaluate(paper, inputs, layout=layout), 1e-13)


@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.parametrize("time", LENGTHS)
def test_chunked_equals_reference(time: int, segments: int) -> None:
    inputs = make_inputs(time, spread=1.0)
    for layout in layouts(time).values():
        expected = evaluate(gru, inputs, layout=layout, impl="reference")
        assert_equal(evaluate(gru, inputs, layout=layout, impl="chunked", segments=segments), expected, 1e-12)


@pytest.mark.parametrize("time", [*LENGTHS, pytest.param(1025, marks=pytest.mark.slow)])
def test_fp32_error_is_earned(time: int) -> None:
    layout, inputs = Layout(packed_positions(time, first=7)), make_inputs(time, width=64)
    assert_earned(gru, inputs, layout=layout)
    if time > 60:  # a state at the border of shorter segments may err by the tolerance and be much of the output
        assert_earned(partial(gru_shot, segments=6), inputs, layout=layout)


@settings(max_examples=25, deadline=None)
@given(row=positions(150), seed=st.integers(0, 99), segments=st.integers(1, 20))
def test_any_documents(row: list[int], seed: int, segments: int) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(len(row), batch=1, width=2)
    options = {"segments": segments, "tolerance": 0.0, "max_corrections": segments}  # or starts err by the tolerance
    assert_equals_reference(gru, inputs, row, impl="chunked", **options)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("time", [1, 3, 11])
def test_gradcheck(time: int, segments: int) -> None:
    inputs = make_inputs(time, batch=1, width=2, spread=1.0)
    layout = Layout(packed_positions(time, first=2, cuts=(4, 5))[:1])

    def run(gates: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        return gru(gates, a, initial_state=state, layout=layout, impl="chunked", segments=segments)

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs.values()])


@pytest.mark.parametrize("kind", ["none", "packed"])
def test_all_corrections_give_the_sequential_loop_to_the_bit(kind: str) -> None:
    """Also for chaotic channels; with a width that vector instructions divide, so that all take the same ones."""
    inputs, layout = make_inputs(320, width=64, spread=2.0, dtype=torch.float32), layouts(320)[kind]
    statistics = Statistics()
    expected = evaluate(gru, inputs, layout=layout, impl="chunked", segments=1)
    for segments in (2, 16):
        shot = partial(gru, tolerance=0.0, max_corrections=segments - 1, statistics=statistics)
        assert_equal(evaluate(shot, inputs, layout=layout, impl="chunked", segments=segments), expected, 0.0)
        assert (statistics.residual, statistics.sequential_channels) == (0.0, 0)


def test_trainable_weights_need_few_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of norm 0.5 and memories of fifty tokens; without Jacobians shooting does not converge on them."""
    inputs, statistics = make_inputs(2048, batch=1, width=64, dtype=torch.float32), Statistics()
    inputs["gates"][:, :, 0] -= 4
    inputs["a"] *= 0.5 / inputs["a"].norm(dim=1, keepdim=True)
    for segments in (4, 16, 64):
        gru(**inputs, segments=segments, statistics=statistics)
        assert statistics.segments == segments
        assert 1 <= statistics.corrections <= 3
        assert statistics.residual <= 1e-6
        assert statistics.sequential_channels == 0
    monkeypatch.setattr(shooting, "segment_products", lambda *_: torch.zeros(1, 64, 1, 1, 64))
    gru(**inputs, segments=64, statistics=statistics)
    assert statistics.sequential_channels > 0


@pytest.mark.parametrize("segments", [1, 16])
def test_saturated_gates_and_wild_weights_give_no_nan(segments: int) -> None:
    """In fp32, with weights from N(0, 4) and gates of 1e4 beside ordinary ones; |h| within reach."""
    inputs = make_inputs(333, width=64, spread=2.0, dtype=torch.float32)
    inputs["gates"][..., ::2] *= 1e4
    inputs["gates"][..., ::8] = 0.0
    inputs["initial_state"] *= 100
    most = inputs["initial_state"].abs().max()
    for layout in layouts(333).values():
        results = evaluate(gru, inputs, layout=layout, impl="chunked", segments=segments)
        assert all(tensor.isfinite().all() for tensor in results.values())
        assert results["output"].abs().max() <= most


@pytest.mark.parametrize(("impl", "segments"), [("reference", None), ("chunked", 1), ("chunked", 7)])
def test_packed_equals_separate(impl: str, segments: int | None) -> None:
    op = partial(gru_of, segments=segments)
    assert_packed_equals_separate(op, without_state(make_inputs(260)), impl=impl, tolerance=1e-12)


@pytest.mark.parametrize("name", ["of", "within"], ids=["everywhere", "backward"])
def test_a_dropped_reset_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restarts, name, lambda *_: None)
    with pytest.raises(AssertionError):
        assert_packed_equals_separate(gru_of, without_state(make_inputs(260)), impl="chunked", tolerance=1e-12)


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("cuts", [(1,), (33,), (32, 64, 65, 96)])
def test_split_equals_whole(cuts: tuple[int, ...], kind: str) -> None:
    inputs, layout = without_state(make_inputs(129)), Layout(packed_positions(129)[:1]) if kind == "packed" else None
    for segments in (1, 8):
        op = partial(gru_of, segments=segments)
        assert_split_equals_whole(op, inputs, cuts=cuts, impl="chunked", tolerance=1e-12, layout=layout)


@pytest.mark.parametrize(("impl", "segments"), [("reference", None), ("chunked", 1), ("chunked", 8)])
def test_bf16_is_rounded_only_at_the_end(impl: str, segments: int | None) -> None:
    inputs = make_inputs(257, width=8, dtype=torch.float32)
    gates = inputs.pop("gates").bfloat16().requires_grad_()
    inputs["a"].requires_grad_()
    y, state = gru(gates, **inputs, impl=impl, segments=segments)
    exact, exact_state = gru(gates.double(), **{k: z.double() for k, z in inputs.items()}, impl="reference")
    assert state is not None
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    dgates, da = torch.autograd.grad(y.float().sum() + state.sum(), (gates, inputs["a"]))
    assert (dgates.dtype, da.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(65, dtype=torch.float32)
    for impl, segments in (("reference", None), ("chunked", 8)):
        expected = evaluate(gru, inputs, impl=impl, segments=segments)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(evaluate(gru, inputs, impl=impl, segments=segments), expected, 0.0)


def test_strided_inputs() -> None:
    inputs = make_inputs(65)
    strided = {
        "gates": inputs["gates"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "a": inputs["a"].T.contiguous().T,
        "initial_state": torch.cat([inputs["initial_state"]] * 2, dim=2)[:, :, :5],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    for segments in (1, 8):
        expected = evaluate(gru, inputs, impl="chunked", segments=segments)
        assert_equal(evaluate(gru, strided, impl="chunked", segments=segments), expected, 1e-15)


def test_no_final_state_unless_asked() -> None:
    assert diagonal_gru(**make_inputs(3))[1] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gates": torch.zeros(2, 3, 5)}, r"gates has shape \[2, 3, 5\]; must be \[B, T, 3, D\]"),
        ({"gates": torch.zeros(2, 3, 4, 5)}, r"gates has shape.*= \[2, 3, 3, 5\]"),
        ({"gates": torch.zeros(2, 0, 3, 5)}, "each size >= 1"),
        ({"a": torch.zeros(2, 5)}, r"a has shape \[2, 5\].*\[3, 5\]"),
        ({"initial_state": torch.zeros(2, 5)}, r"initial_state has shape.*\[B, 1, D\]"),
        ({"a": torch.zeros(3, 5, dtype=torch.int64)}, "a has dtype torch.int64"),
        ({"layout": Layout(torch.arange(4).repeat(2, 1))}, "layout.positions"),
        ({"impl": "fla"}, "diagonal_gru has no implementation 'fla'; choose one of auto, chunked, "),
        ({"segments": 0}, "segments is 0; must be >= 1"),
        ({"tolerance": float("nan")}, "tolerance is nan; must be >= 0"),
        ({"max_corrections": 2, "impl": "reference"}, "has no segments: leave max_corrections out"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3, dtype=torch.float32) | wrong
    with pytest.raises(ValueError, match=message):
        diagonal_gru(**arguments)
