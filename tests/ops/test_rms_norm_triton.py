"""rms_norm's Triton kernels against its formula, and what must hold of every implementation of it."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from ops import rms_norm
from ops.rms_norm import fla, triton
from tests.ops.compare import DEVICE, SLOW, Inputs, assert_earned, assert_earned_bf16, assert_equal, evaluate

IMPLS = ["chunked", "triton"]


def norm(*, impl: str = "triton", **arguments: Any) -> tuple[Tensor, None]:
    return rms_norm(**arguments, impl=impl), None


def make_inputs(*shape: int, gated: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    inputs = {name: torch.randn(shape, dtype=dtype) for name in ("x", "gate")} | {"weight": torch.randn(shape[-1:])}
    return {name: z.to(dtype) for name, z in inputs.items() if gated or name != "gate"}


@pytest.mark.parametrize(
    ("shape", "gated", "one_plus_weight", "eps"),
    [
        ((7,), False, True, 1e-6),
        ((1, 1), True, False, 0.5),  # without eps the gradient of x would be nothing but rounding
        ((2, 5, 3, 60), True, True, 1e-6),
        ((300, 64), True, False, 1e-5),
        ((3, 256), False, True, 1e-2),
        ((35, 2050), False, False, 1e-6),
    ],
)
def test_triton_earns_its_tolerance(shape: tuple[int, ...], gated: bool, one_plus_weight: bool, eps: float) -> None:
    inputs = make_inputs(*shape, gated=gated)
    assert_earned(norm, inputs, impl="triton", one_plus_weight=one_plus_weight, eps=eps)


ROWS, WIDTHS = (1, 2, 65, 257, 1025), (16, 60, 64, 100, 128, 256, 2560, 16384)
# Interpreted, each number of rows with each width, gated or not in turn.
PAIRS = [(rows, width, (i + j) % 2 > 0) for i, rows in enumerate(ROWS) for j, width in enumerate(WIDTHS)]
GRID = PAIRS if DEVICE == "cpu" else [*product(ROWS, WIDTHS, (False, True))]


@pytest.mark.parametrize(("rows", "width", "gated"), [pytest.param(*case, marks=SLOW) for case in GRID])
def test_triton_earns_its_tolerance_on_the_grid(rows: int, width: int, gated: bool) -> None:
    inputs = make_inputs(rows if width < 2560 else min(rows, 65), width, gated=gated)
    assert_earned(norm, inputs, impl="triton")
    assert_earned_bf16(norm, inputs)


@pytest.mark.parametrize("gated", [False, True])
def test_bf16_is_computed_in_fp32(gated: bool) -> None:
    assert_earned_bf16(norm, make_inputs(40, 60, gated=gated))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str) -> None:
    inputs = make_inputs(2, 3, 4)
    leaves = [z.to(DEVICE).requires_grad_() for z in inputs.values()]

    def function(*leaves: Tensor) -> Tensor:
        return rms_norm(**dict(zip(inputs, leaves)), one_plus_weight=True, impl=impl)

    if impl == "triton" and DEVICE == "cuda":
        with pytest.raises(ValueError, match=r"x has dtype torch\.float64; .* use 'chunked'"):
            function(*leaves)
    else:
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_slices_of_a_wider_tensor() -> None:
    """Neither x, gate nor the gradient of y has to be contiguous."""
    inputs = make_inputs(2, 5, 12, dtype=torch.float32)
    wide = torch.randn(2, 5, 36)
    wide[..., :12], wide[..., 24:] = inputs["x"], inputs["gate"]
    strided = inputs | {"x": wide[..., :12], "gate": wide[..., 24:]}
    assert_equal(evaluate(norm, strided), evaluate(norm, inputs), 0.0)
    permuted = {
        name: z if z.dim() == 1 else z.permute(2, 0, 1).contiguous().permute(1, 2, 0) for name, z in inputs.items()
    }
    assert_equal(evaluate(norm, permuted), evaluate(norm, inputs), 0.0)


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
        patched.setattr(triton, "MIN_ROWS", 1)
        patched.setattr(triton, "MIN_TILES", 1)
        patched.setattr(triton, "TILE", 16)
        x, weight = torch.zeros(70_000, 16, device=DEVICE), torch.zeros(16, device=DEVICE)
        triton.forward(x, weight, None, 1e-6, False)
        triton.backward(x, weight, None, 1e-6, False, x)
    assert grids == [(70_000,), (70_000,)]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl: str) -> None:
    x, weight = torch.zeros(0, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    y = rms_norm(x, weight, impl=impl)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert (y.shape, dx.shape) == ((0, 8), (0, 8))
    assert torch.equal(dweight, torch.zeros_like(weight))


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), width=st.integers(1, 40), scale=st.floats(-8, 8), impl=st.sampled_from(IMPLS))
def test_rows_do_not_see_each_other(rows: int, width: int, scale: float, impl: str) -> None:
    inputs = {name: z.to(DEVICE) for name, z in make_inputs(rows, width, dtype=torch.float32).items()}
    whole = rms_norm(**inputs, impl=impl)
    order = torch.randperm(rows)
    changed = {name: z[order] if z.dim() > 1 else z for name, z in inputs.items()}
    torch.testing.assert_close(rms_norm(**changed, impl=impl), whole[order])
    changed["x"] = changed["x"].clone()
    changed["x"][0] *= 10**scale
    torch.testing.assert_close(rms_norm(**changed, impl=impl)[1:], whole[order][1:])


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        pytest.param("forward", lambda real: lambda x, w, g, eps, one: real(x, w, None, eps, one), id="gate"),
        pytest.param("forward", lambda real: lambda x, w, g, eps, one: real(x, w, g, eps / 2, one), id="eps"),
        pytest.param(
            "backward", lambda real: lambda x, w, g, eps, one, dy: real(x, w, g, eps / 2, one, dy), id="eps, backward"
        ),
        pytest.param(
            "backward", lambda real: lambda x, w, g, eps, one, dy: real(x, w, g, eps, False, dy), id="one_plus_weight"
        ),
        pytest.param(
            "backward",
            lambda real: (
                lambda x, w, g, eps, one, dy: (
                    dy * silu(g) * (1 + w) * (x.square().mean(-1, keepdim=True) + eps).rsqrt(),
                    *real(x, w, g, eps, one, dy)[1:],
                )
            ),
            id="gradient of the root mean square",
        ),
    ],
)
def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch, name: str, mutate: Any) -> None:
    monkeypatch.setattr(triton, name, mutate(getattr(triton, name)))
    with pytest.raises(AssertionError, match="earned"):
        assert_earned(norm, make_inputs(3, 16), impl="triton", one_plus_weight=True, eps=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_is_checkpointed(impl: str) -> None:
    inputs = make_inputs(3, 5, 16, dtype=torch.float32)
    leaves = [z.to(DEVICE).requires_grad_() for z in inputs.values()]

    def function(*leaves: Tensor) -> Tensor:
        return rms_norm(**dict(zip(inputs, leaves)), one_plus_weight=True, impl=impl)

    def gradients(function: Any) -> list[Tensor]:
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected = gradients(function)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    checkpointed = partial(checkpoint, function, use_reentrant=False)
    with torch.autocast(DEVICE, torch.bfloat16):
        autocast = gradients(function)
    for found in (gradients(compiled), gradients(checkpointed), autocast):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gated", [pytest.param(False, marks=SLOW), True])
def test_ops_are_registered_right(gated: bool) -> None:
    inputs = {name: z.to(DEVICE) for name, z in make_inputs(2, 3, 16, gated=gated, dtype=torch.float32).items()}
    arguments = (inputs["x"], inputs["weight"], inputs.get("gate"))
    torch.library.opcheck(triton.backward, (*arguments, 1e-6, False, torch.randn(2, 3, 16, device=DEVICE)))
    differentiable = [z if z is None else z.requires_grad_() for z in arguments]
    torch.library.opcheck(triton.forward, (*differentiable, 1e-6, True))


def test_triton_refuses_wide_rows() -> None:
    with pytest.raises(ValueError, match="D = 16385; the implementation 'triton' takes at most 16384: use 'chunked'"):
        norm(x=torch.zeros(1, 16385, device=DEVICE), weight=torch.zeros(16385, device=DEVICE))


def test_fla_gets_our_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping alone: flash-linear-attention's kernels run on a GPU, where `runnable` puts them to the test."""
    from fla.modules.norm import fused_norm_gate, layernorm

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return layernorm.rms_norm_ref(x, weight, bias, eps=eps)

    def gated(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, activation: str, eps: float) -> Tensor:
        assert activation == "swish"
        return layernorm.rms_norm_ref(x, weight, bias, eps=eps) * silu(g)

    monkeypatch.setattr(layernorm, "rms_norm", plain)
    monkeypatch.setattr(fused_norm_gate, "rms_norm_gated", gated)
    inputs = make_inputs(3, 16, dtype=torch.float32)
    x, gate, weight = inputs["x"], inputs["gate"], inputs["weight"]
    for kept, one_plus_weight in ((None, False), (gate, True)):
        found = fla.rms_norm(x, weight, 1e-2, one_plus_weight, kept)
        expected = rms_norm(x, weight, eps=1e-2, one_plus_weight=one_plus_weight, gate=kept, impl="reference")
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"torch\.float64; the implementation 'fla'"):
        fla.rms_norm(x.double(), weight, 1e-6, False, None)
    with pytest.raises(ValueError, match="D = 20000; the implementation 'fla' takes at most 16384"):
        fla.rms_norm(torch.zeros(1, 20000), torch.zeros(20000), 1e-6, False, None)
