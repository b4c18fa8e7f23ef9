"""causal_conv1d's Triton kernels against the time loop."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import Layout, causal_conv1d
from ops.causal_conv1d import triton
from tests.ops.compare import (
    DEVICE,
    LENGTHS,
    SLOW,
    assert_earned,
    assert_earned_bf16,
    assert_equal,
    evaluate,
    layouts,
    packed_positions,
)
from tests.ops.test_causal_conv1d import make_inputs

INTERPRETED = DEVICE == "cpu"
# float64 under the interpreter only.
DTYPE, TOLERANCE = (torch.float64, 1e-13) if INTERPRETED else (torch.float32, 2e-6)


def conv(*, layout: Layout | None = None, impl: str = "triton", **arguments: Any) -> tuple[Tensor, Tensor]:
    """causal_conv1d with its final state, computed on DEVICE."""
    here = {name: z.to(DEVICE) if isinstance(z, Tensor) else z for name, z in arguments.items()}
    layout = None if layout is None else Layout(layout.positions.to(DEVICE))
    y, state = causal_conv1d(**here, layout=layout, output_final_state=True, impl=impl)
    return (y, state) if arguments["x"].is_cuda else (y.cpu(), state.cpu())


@pytest.fixture(autouse=True)
def short_segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter walks through 8 steps a segment instead of 32, except where a test asks for the real number."""
    if INTERPRETED and "real_segments" not in request.fixturenames:
        monkeypatch.setattr(triton, "STEPS", 8)


@pytest.fixture
def real_segments() -> None:
    pass


@pytest.mark.parametrize(
    ("time", "window", "width", "kind", "activation", "given"),
    [
        (1, 4, 5, "continued", "silu", "bias initial_state"),
        (2, 4, 5, "packed", None, "initial_state"),
        (6, 8, 3, "continued", "silu", "bias initial_state"),
        (17, 1, 5, "packed", "silu", "bias"),
        (17, 2, 5, "none", None, "bias initial_state"),
        (33, 3, 70, "packed", "silu", ""),
        (65, 4, 5, "packed", "silu", "bias initial_state"),
        pytest.param(65, 4, 16, "none", "silu", "", marks=SLOW),
    ],
)
def test_triton_earns_its_tolerance(
    time: int, window: int, width: int, kind: str, activation: str | None, given: str
) -> None:
    inputs = {
        n: z for n, z in make_inputs(time, window=window, width=width).items() if n in ("x", "weight", *given.split())
    }
    assert_earned(partial(conv, activation=activation), inputs, layout=layouts(time)[kind], impl="triton")


WINDOWS, KINDS = (1, 2, 4, 8), ("none", "packed", "continued")
# Interpreted, each length with each kind of document, but the longest with one, and windows in turn.
PAIRS = [(t, WINDOWS[(i + j) % 4], kind) for i, t in enumerate(LENGTHS) for j, kind in enumerate(KINDS)]
PAIRS = [(t, window, kind) for t, window, kind in PAIRS if t < 1025 or kind == "packed"]
GRID = PAIRS if INTERPRETED else [*product(LENGTHS, WINDOWS, KINDS)]


@pytest.mark.usefixtures("real_segments")
@pytest.mark.parametrize(("time", "window", "kind"), [pytest.param(*case, marks=SLOW) for case in GRID])
def test_triton_earns_its_tolerance_on_the_grid(time: int, window: int, kind: str) -> None:
    inputs, layout = make_inputs(time, window=window, width=100), layouts(time)[kind]
    assert_earned(partial(conv, activation="silu"), inputs, layout=layout, impl="triton")
    assert_earned_bf16(partial(conv, activation="silu"), inputs, layout=layout)


@SLOW
@pytest.mark.usefixtures("real_segments")
def test_segments_of_the_real_length() -> None:
    inputs, layout = make_inputs(65, dtype=torch.float32), layouts(65)["packed"]
    assert_earned(partial(conv, activation="silu"), inputs, layout=layout, impl="triton")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_bf16_is_summed_in_fp32(activation: str | None) -> None:
    assert_earned_bf16(partial(conv, activation=activation), make_inputs(33), layout=layouts(33)["packed"])


@SLOW
def test_triton_gradcheck() -> None:
    if not INTERPRETED:
        with pytest.raises(ValueError, match=r"x has dtype torch\.float64; .* use 'chunked'"):
            conv(**make_inputs(3))
        return
    inputs = make_inputs(4, window=3, width=1)
    layout = Layout(packed_positions(4, first=1, cuts=(2,)))

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return conv(**dict(zip(inputs, leaves)), activation="silu", layout=layout)

    leaves = [z.requires_grad_() for z in inputs.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("kind", ["none", "continued"])
def test_trap_state_gradients_of_inputs_shorter_than_the_window(kind: str, time: int) -> None:
    """flash-linear-attention #1140 and #1141: with T < W - 1 part of the initial state is part of the final state."""
    inputs = make_inputs(time, dtype=DTYPE)
    leaves = {name: z.requires_grad_() for name, z in inputs.items()}
    factor = torch.randn(2, 3, 5, dtype=DTYPE)
    gradients = []
    for impl in ("reference", "triton"):
        _, state = conv(**leaves, layout=layouts(time)[kind], impl=impl)
        found = torch.autograd.grad((state * factor).sum(), list(leaves.values()), materialize_grads=True)
        gradients.append(dict(zip(leaves, found)))
    assert gradients[0]["initial_state"].abs().sum() > 0
    assert_equal(gradients[1], gradients[0], TOLERANCE)


def test_trap_initial_state_gradient_with_a_strided_gradient() -> None:
    """flash-linear-attention #1138: the gradient of y comes permuted in memory, or one number for all."""
    inputs = make_inputs(9, dtype=DTYPE)
    leaves = [z.requires_grad_() for z in inputs.values()]
    factor = torch.randn(5, 9, 2, dtype=DTYPE)
    for loss in (lambda y: (y.permute(2, 1, 0) * factor).sum(), lambda y: y.sum()):
        expected, found = (
            torch.autograd.grad(loss(conv(**dict(zip(inputs, leaves)), activation="silu", impl=impl)[0]), leaves)
            for impl in ("reference", "triton")
        )
        assert_equal(dict(zip(inputs, found)), dict(zip(inputs, expected)), TOLERANCE)


def test_trap_weight_gradient_of_packed_rows() -> None:
    """flash-linear-attention PR 955: with documents and several rows the gradient of the weight is still their sum."""
    inputs = {name: z for name, z in make_inputs(41, dtype=DTYPE).items() if name != "initial_state"}
    layout = Layout(packed_positions(41).roll(1, 0))
    whole = evaluate(conv, inputs, layout=layout, impl="triton")
    leaves = {name: inputs[name].requires_grad_() for name in ("weight", "bias")}
    factor = torch.randn(2, 41, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DTYPE)
    total = torch.zeros(())
    for row in range(2):
        borders = [*(layout.positions[row] == 0).nonzero().flatten().tolist(), 41]
        for a, b in zip(borders, borders[1:]):
            y, _ = conv(x=inputs["x"][row : row + 1, a:b], **leaves, impl="reference")
            total = total + (y * factor[row, a:b]).sum()
    expected = torch.autograd.grad(total, list(leaves.values()))
    assert_equal(
        {"d weight": whole["d weight"], "d bias": whole["d bias"]},
        dict(zip(("d weight", "d bias"), expected)),
        TOLERANCE,
    )


def test_trap_grid_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first axis of a grid may be larger than 65,535."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    with monkeypatch.context() as patched:
        patched.setattr(triton, "_forward", Recorder())
        patched.setattr(triton, "_backward", Recorder())
        x = torch.zeros(70_000, 1, 1, device=DEVICE, requires_grad=True)
        conv(x=x, weight=torch.zeros(1, 2))[0].sum().backward()
    assert grids == [(70_000,), (70_000,)]
    rows = 70_000 if DEVICE == "cuda" else 3
    x, weight = torch.randn(rows, 1, 1), torch.randn(1, 2)
    torch.testing.assert_close(conv(x=x, weight=weight)[0], x * weight[:, 1])


def test_slices_of_a_wider_tensor() -> None:
    """Neither x nor the gradient of y has to be contiguous; both are read where they are."""
    inputs = make_inputs(5, dtype=DTYPE)
    wide = torch.randn(2, 5, 15, dtype=DTYPE)
    wide[..., 5:10] = inputs["x"]
    strided = inputs | {"x": wide[..., 5:10], "weight": inputs["weight"].T.clone().T}
    assert_equal(evaluate(conv, strided), evaluate(conv, inputs), 0.0)
    permuted = inputs | {"x": inputs["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0)}
    assert_equal(evaluate(conv, permuted), evaluate(conv, inputs), 0.0)


def _drop(index: int, value: Any = None) -> Any:
    return lambda real: lambda *arguments: real(*arguments[:index], value, *arguments[index + 1 :])


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        pytest.param("forward", _drop(3), id="documents, forward"),
        pytest.param("backward", _drop(3), id="documents, backward"),
        pytest.param("forward", _drop(4), id="carried state, forward"),
        pytest.param("backward", _drop(7), id="gradient of the final state"),
        pytest.param("backward", _drop(5, False), id="derivative of silu"),
        pytest.param("backward", lambda real: lambda *a: real(a[0] * (a[0] > 0), *a[1:]), id="part of the inputs"),
    ],
)
def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch, name: str, mutate: Any) -> None:
    inputs, layout = make_inputs(5), Layout(packed_positions(5, first=1, cuts=(3,)))
    monkeypatch.setattr(triton, name, mutate(getattr(triton, name)))
    with pytest.raises(AssertionError, match="earned"):
        assert_earned(partial(conv, activation="silu"), inputs, layout=layout, impl="triton")


@pytest.mark.parametrize("given", ["", pytest.param("bias positions initial_state", marks=SLOW)])
def test_ops_are_registered_right(given: str) -> None:
    inputs = make_inputs(3, window=3, dtype=torch.float32) | {"positions": packed_positions(3, cuts=(1,))}
    here = {n: z.to(DEVICE) for n, z in inputs.items() if n in ("x", "weight", *given.split())}
    arguments = [here.get(name) for name in ("x", "weight", "bias", "positions", "initial_state")]
    differentiable = [z.requires_grad_() if z is not None and z.is_floating_point() else z for z in arguments]
    torch.library.opcheck(triton.forward, (*differentiable, True))
    plain = [z if z is None else z.detach() for z in arguments]
    dstate = torch.randn(2, 2, 5, device=DEVICE) if given else None
    torch.library.opcheck(triton.backward, (*plain, True, torch.randn(2, 3, 5, device=DEVICE), dstate))


def test_triton_refuses_a_wide_window() -> None:
    with pytest.raises(ValueError, match="W = 9 taps; the implementation 'triton' takes at most 8: use 'chunked'"):
        conv(**make_inputs(3, window=9))
