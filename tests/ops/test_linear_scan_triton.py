"""linear_scan's Triton kernels against the time loop, and the traps that kernels of scans fell into elsewhere."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import Layout
from ops.linear_scan import triton
from tests.ops.compare import (
    DEVICE,
    LENGTHS,
    SLOW,
    assert_earned,
    assert_earned_bf16,
    assert_equal,
    evaluate,
    extreme_decays,
    layouts,
    packed_positions,
)
from tests.ops.test_linear_scan import make_inputs, scan

INTERPRETED = DEVICE == "cpu"
# float64 under the interpreter only.
DTYPE, TOLERANCE = (torch.float64, 1e-13) if INTERPRETED else (torch.float32, 2e-6)


@pytest.fixture(autouse=True)
def short_words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of 4 tokens and segments of at least 4, so that the interpreter meets every kind of border soon; a test
    that asks for `real_words` runs with those of the kernels."""
    if INTERPRETED and "real_words" not in request.fixturenames:
        monkeypatch.setattr(triton, "BT", 4)
        monkeypatch.setattr(triton, "MIN_SEGMENT", 4)


@pytest.fixture
def real_words() -> None:
    pass


@pytest.mark.parametrize(
    ("time", "batch", "width", "kind", "with_state"),
    [
        (1, 2, 5, "none", True),
        (4, 1, 64, "none", True),
        (5, 1, 70, "none", False),
        (8, 1, 5, "packed", True),
        (17, 2, 3, "packed", True),
        (33, 1, 5, "continued", True),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                (1, 1, 64, "packed", False),
                (2, 2, 3, "packed", True),
                (3, 1, 5, "continued", True),
                (7, 2, 5, "continued", False),
                (16, 1, 64, "continued", True),
                (18, 1, 65, "packed", False),
                (35, 1, 5, "none", True),
            )
        ),
    ],
)
def test_equals_reference(time: int, batch: int, width: int, kind: str, with_state: bool) -> None:
    inputs, layout = make_inputs(time, batch=batch, width=width, dtype=DTYPE), layouts(time)[kind]
    if not with_state:
        del inputs["initial_state"]
    if layout is not None and batch == 1:
        layout = Layout(layout.positions[:1])
    expected = evaluate(scan, inputs, layout=layout, impl="reference")
    assert_equal(evaluate(scan, inputs, layout=layout, impl="triton"), expected, TOLERANCE)


@pytest.mark.parametrize("time", [15, 33])
@pytest.mark.usefixtures("real_words")
def test_error_is_earned(time: int) -> None:
    layout = Layout(packed_positions(time, first=1)[:1])
    inputs = make_inputs(time, batch=1, width=64, dtype=torch.float32)
    assert_earned(scan, inputs, impl="triton", layout=layout)
    assert_earned_bf16(scan, inputs, layout=layout)


WIDTHS, KINDS = (16, 60, 64, 100, 128, 256), ("none", "packed", "continued")
# Interpreted, each length with each kind of document, but the longest with one, and widths in turn.
PAIRS = [(t, WIDTHS[(i + j) % 6], kind) for i, t in enumerate(LENGTHS) for j, kind in enumerate(KINDS)]
PAIRS = [(t, width, kind) for t, width, kind in PAIRS if t < 1025 or kind == "packed"]
GRID = PAIRS if INTERPRETED else [*product(LENGTHS, WIDTHS, KINDS)]


@pytest.mark.parametrize(("time", "width", "kind"), [pytest.param(*case, marks=SLOW) for case in GRID])
@pytest.mark.usefixtures("real_words")
def test_error_is_earned_everywhere(time: int, width: int, kind: str) -> None:
    inputs, layout = make_inputs(time, width=width, dtype=torch.float32), layouts(time)[kind]
    assert_earned(scan, inputs, impl="triton", layout=layout)
    assert_earned_bf16(scan, inputs, layout=layout)


@pytest.mark.parametrize("kind", ["none", "continued"])
def test_gate_of_one_and_total_decay(kind: str) -> None:
    """Decays of 1, of exp(-1e4) and of exactly 0 beside ordinary ones."""
    inputs = make_inputs(11, width=6, dtype=torch.float32)
    inputs["log_decay"] = extreme_decays(*inputs["log_decay"].shape)
    assert_earned(scan, inputs, impl="triton", layout=layouts(11)[kind])


def test_padding_rows_exp_overflow() -> None:
    """Behind the last token lie log decays whose exponential is infinite, and NaN: nothing of them is seen."""
    inputs = make_inputs(17, batch=1, dtype=DTYPE)
    expected = evaluate(scan, inputs, impl="reference")
    behind = {"x": torch.nan, "log_decay": 1e30}
    long = {name: torch.cat([inputs[name], torch.full_like(inputs[name], z)], 1) for name, z in behind.items()}
    leaves = {n: z.to(DEVICE)[:, :17] for n, z in long.items()} | {"initial_state": inputs["initial_state"].to(DEVICE)}
    assert all(z.is_contiguous() for z in leaves.values())
    y, state = scan(**leaves, impl="triton")
    assert_equal(
        {"output": y.cpu(), "state 0": state.cpu()}, {n: expected[n] for n in ("output", "state 0")}, TOLERANCE
    )
    resets = triton._reset_bits(torch.ones(1, 17, dtype=torch.int64, device=DEVICE))
    y, x, log_decay = y.detach(), leaves["x"], leaves["log_decay"]
    for gradient in triton.backward(x, torch.zeros_like(state), log_decay, y, None, resets):
        assert gradient.isfinite().all()


def test_reverse_associative_scan_is_not_used() -> None:
    """Triton's reverse=True gave wrong results (its issue 4362): gradients walk loads from the last to the first."""
    source = Path(triton.__file__).read_text(encoding="utf-8")
    assert "reverse=True" not in source.replace("count, length, reverse=True)", "")
    assert "associative_scan" not in source
    inputs = make_inputs(11, batch=1, width=3, dtype=DTYPE)
    inputs["log_decay"] = -torch.arange(33, dtype=DTYPE).view(1, 11, 3) / 10  # no symmetry under reversal
    expected = evaluate(scan, inputs, impl="reference")
    assert_equal(evaluate(scan, inputs, impl="triton"), expected, TOLERANCE)


def test_grid_limits() -> None:
    """Only axis 0 of a grid may exceed 65535, so all programs lie there; offsets past 2**31 are 64 bit."""
    assert triton._grid(70_000, 4096, 3) == (70_000 * 64 * 3,)
    inputs = {"x": torch.randn(1, 2, 3), "log_decay": -torch.rand(1, 2, 3)}
    if not INTERPRETED:  # a program a row, more rows than the other axes allow
        inputs = {name: z.repeat(70_000, 1, 1) for name, z in inputs.items()}
    expected = evaluate(scan, inputs, impl="reference")
    assert_equal(evaluate(scan, inputs, impl="triton"), expected, 2e-6)


@pytest.mark.usefixtures("real_words")
def test_segments() -> None:
    """They cover every token, are cut at words of reset bits, and exist only where rows and channels are too few."""
    assert triton._segments(8, 4096, 2560) == (1, 4096)
    assert triton._segments(1, 32768, 2560)[0] == 16
    assert triton._segments(2, 100, 64)[0] == 1
    for batch in (1, 3, 40):
        for time in (1, 255, 256, 700, 1025, 40_001):
            count, length = triton._segments(batch, time, 128)
            assert (count - 1) * length < time <= count * length
            assert count == 1 or length % triton.BT == 0


def test_number_of_segments_compiles_nothing() -> None:
    """Neither T nor the number or length of the segments is a constant of a kernel, or specialised."""
    for kernel in (triton._forward_kernel, triton._backward_kernel, triton._summary_kernel):
        annotations = kernel.fn.__annotations__
        assert not annotations.keys() & {"T", "S", "L", "D"}
    assert Path(triton.__file__).read_text(encoding="utf-8").count('do_not_specialize=["T", "S", "L"]') == 3


@pytest.mark.skipif(not INTERPRETED, reason="float64 runs under the interpreter only")
@pytest.mark.parametrize("time", [1, pytest.param(9, marks=SLOW)])
def test_gradcheck(time: int) -> None:
    inputs = make_inputs(time, batch=1, width=2)
    resets = triton._reset_bits(packed_positions(time, first=2, cuts=(4, 5))[:1])
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *z: triton.forward(*z, resets), leaves, fast_mode=True)


def test_float64_on_a_gpu_is_refused() -> None:
    x: Any = SimpleNamespace(dtype=torch.float64, is_cuda=True)
    with pytest.raises(ValueError, match=r"x is torch\.float64.*choose impl 'chunked'"):
        triton._checked_dtype(x, x)


def test_strided_inputs() -> None:
    inputs = make_inputs(9, dtype=DTYPE)
    strided = {
        "x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "log_decay": torch.cat([inputs["log_decay"]] * 2, dim=2)[:, :, :5],
        "initial_state": inputs["initial_state"].T.contiguous().T,
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_equal(evaluate(scan, strided, impl="triton"), evaluate(scan, inputs, impl="triton"), 0.0)


@pytest.mark.parametrize("decays", [torch.float32, torch.bfloat16])
def test_dtypes(decays: torch.dtype) -> None:
    """Results in the dtypes of their arguments, states in fp32 and rounded nowhere."""
    x = torch.randn(1, 9, 5, device=DEVICE).bfloat16().requires_grad_()
    log_decay = (-torch.rand(1, 9, 5, device=DEVICE)).to(decays).requires_grad_()
    initial = torch.randn(1, 5, device=DEVICE, requires_grad=True)
    y, state = scan(x, log_decay, initial_state=initial, impl="triton")
    _, exact = scan(x.double(), log_decay.double(), initial_state=initial.double(), impl="reference")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state.double(), exact, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(y.float().sum() + state.sum(), [x, log_decay, initial])
    assert [z.dtype for z in gradients] == [torch.bfloat16, decays, torch.float32]


def _without_backward(name: str) -> Callable[..., Any]:
    """`triton.backward` that sees zeros in place of one argument."""
    real, place = triton.backward, ("dy", "dstate", "log_decay", "y", "initial_state", "resets").index(name)

    def mutant(*args: Any) -> Any:
        return real(*args[:place], torch.zeros_like(args[place]), *args[place + 1 :])

    return mutant


def _no_carry(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    batch, _, width = args[0].shape
    total, end = torch.zeros(2, batch, args[3], width, dtype=DTYPE, device=DEVICE)
    return total, end


MUTANTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "a reset": ("_reset_bits", lambda: lambda p: torch.zeros(len(p), -(-p.shape[1] // triton.BT), dtype=torch.int32)),
    "the state between segments": ("_summaries", lambda: _no_carry),
    "the gradient of the last state": ("backward", lambda: _without_backward("dstate")),
    "the gradient of the decay": ("backward", lambda: _without_backward("y")),
    "the initial state's share in it": ("backward", lambda: _without_backward("initial_state")),
    "the reset of a gradient": ("backward", lambda: _without_backward("resets")),
}


@pytest.mark.parametrize("dropped", [None, *MUTANTS])
def test_what_is_dropped_is_caught(dropped: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, layout = make_inputs(9, dtype=DTYPE, width=3), layouts(9)["continued"]
    expected = evaluate(scan, inputs, layout=layout, impl="reference")
    if dropped is None:
        assert_equal(evaluate(scan, inputs, layout=layout, impl="triton"), expected, TOLERANCE)
        return
    name, make = MUTANTS[dropped]
    mutant = make()
    monkeypatch.setattr(triton, name, mutant)
    with pytest.raises(AssertionError):
        assert_equal(evaluate(scan, inputs, layout=layout, impl="triton"), expected, TOLERANCE)
