"""linear_scan: chunked against the time loop, the time loop against the closed form."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import Layout, linear_scan
from ops.linear_scan import chunked
from tests.ops.compare import (
    QUICK_LENGTHS,
    Inputs,
    assert_earned,
    assert_equal,
    assert_packed_equals_separate,
    assert_split_equals_whole,
    evaluate,
    extreme_decays,
    layouts,
    packed_positions,
)
from tests.ops.documents import assert_equals_reference, positions

scan = partial(linear_scan, output_final_state=True)


def scan_from(*, state: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    return scan(**arguments, initial_state=state)


def make_inputs(time: int, *, batch: int = 2, width: int = 5, dtype: torch.dtype = torch.float64) -> Inputs:
    return {
        "x": torch.randn(batch, time, width, dtype=dtype),
        "log_decay": -torch.rand(batch, time, width, dtype=dtype) * 0.3,
        "initial_state": torch.randn(batch, width, dtype=dtype),
    }


def without_state(inputs: Inputs) -> Inputs:
    return {name: tensor[:1] for name, tensor in inputs.items() if name != "initial_state"}


def test_reference_is_the_closed_form() -> None:
    """h_t = sum over s <= t of t's document of exp(sum of log decays after s up to t) * x_s."""
    inputs = without_state(make_inputs(40))
    positions = packed_positions(40, cuts=(1, 2, 16, 33))[:1]
    y, _ = scan(**inputs, layout=Layout(positions), impl="reference")
    x, log_decay = inputs["x"][0], inputs["log_decay"][0]
    for t in range(40):
        first = t - int(positions[0, t])
        expected = sum(log_decay[s + 1 : t + 1].sum(0).exp() * x[s] for s in range(first, t + 1))
        torch.testing.assert_close(y[0, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("time", QUICK_LENGTHS)
def test_chunked_equals_reference(time: int, kind: str) -> None:
    inputs, layout = make_inputs(time), layouts(time)[kind]
    expected = evaluate(scan, inputs, layout=layout, impl="reference")
    assert_equal(evaluate(scan, inputs, layout=layout, impl="chunked"), expected, 1e-13)


@pytest.mark.parametrize("time", QUICK_LENGTHS)
def test_fp32_error_is_earned(time: int) -> None:
    for layout in layouts(time).values():
        assert_earned(scan, make_inputs(time, width=64), layout=layout)


@settings(max_examples=25, deadline=None)
@given(row=positions(150), seed=st.integers(0, 99))
def test_any_documents(row: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(len(row), batch=1, width=2)
    assert_equals_reference(scan, inputs, row, impl="chunked")


@pytest.mark.parametrize("kind", ["none", "continued"])
def test_extreme_decays(kind: str) -> None:
    """Decays of 1, of exp(-1e4) and of exactly 0 beside ordinary ones give no NaN and the reference's numbers."""
    inputs = make_inputs(130, width=40, dtype=torch.float32)
    inputs["log_decay"] = extreme_decays(*inputs["log_decay"].shape)
    assert_earned(scan, inputs, layout=layouts(130)[kind])


@pytest.mark.parametrize("time", [1, 3, 11])
def test_gradcheck(time: int) -> None:
    inputs = make_inputs(time, width=2)
    starts = packed_positions(time, first=2, cuts=(4, 5)) == 0
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *z: chunked.forward(*z, starts)[:2], leaves)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_packed_equals_separate(impl: str) -> None:
    assert_packed_equals_separate(scan, without_state(make_inputs(260)), impl=impl, tolerance=1e-13)


def test_a_dropped_reset_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "starts", property(lambda self: torch.zeros_like(self.positions, dtype=torch.bool)))
    with pytest.raises(AssertionError):
        assert_packed_equals_separate(scan, without_state(make_inputs(260)), impl="chunked", tolerance=1e-13)


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("cuts", [(1,), (33,), (32, 64, 65, 96)])
def test_split_equals_whole(cuts: tuple[int, ...], kind: str) -> None:
    inputs = {name: make_inputs(129)[name] for name in ("x", "log_decay")}
    assert_split_equals_whole(scan_from, inputs, cuts=cuts, impl="chunked", tolerance=1e-13, layout=layouts(129)[kind])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_bf16_is_rounded_only_at_the_end(impl: str) -> None:
    x = torch.randn(2, 257, 8).bfloat16()
    log_decay = -torch.rand(2, 257, 8) * 0.01
    y, state = scan(x, log_decay, impl=impl)
    exact, exact_state = scan(x.double(), log_decay.double(), impl="reference")
    assert y.dtype == torch.bfloat16
    assert state is not None
    assert state.dtype == torch.float32
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(65, dtype=torch.float32)
    expected = evaluate(scan, inputs, impl="chunked")
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(evaluate(scan, inputs, impl="chunked"), expected, 0.0)


def test_strided_inputs() -> None:
    inputs = make_inputs(65)
    strided = {
        "x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "log_decay": torch.cat([inputs["log_decay"]] * 2, dim=2)[:, :, :5],
        "initial_state": inputs["initial_state"].T.contiguous().T,
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_equal(evaluate(scan, strided, impl="chunked"), evaluate(scan, inputs, impl="chunked"), 0.0)


def test_no_final_state_unless_asked() -> None:
    inputs = make_inputs(3)
    assert linear_scan(**inputs)[1] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x has shape \[2, 5\]; must be \[B, T, D\]"),
        ({"x": torch.zeros(2, 0, 5)}, "each size >= 1"),
        ({"log_decay": torch.zeros(2, 3, 4)}, r"log_decay has shape \[2, 3, 4\].*\[2, 3, 5\]"),
        ({"initial_state": torch.zeros(2, 1, 5)}, "initial_state"),
        ({"log_decay": torch.zeros(2, 3, 5, dtype=torch.int64)}, "log_decay has dtype torch.int64"),
        ({"layout": Layout(torch.arange(4).repeat(2, 1))}, "layout.positions"),
        ({"impl": "fla"}, "cannot run on device 'cpu': it needs a GPU; choose one of auto, chunked, reference"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3, dtype=torch.float32) | wrong
    with pytest.raises(ValueError, match=message):
        linear_scan(**arguments)
