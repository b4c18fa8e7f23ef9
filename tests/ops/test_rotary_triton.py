"""rotary's Triton kernel against its formula."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops import rotary
from ops.rotary import triton
from tests.ops.compare import DEVICE, SLOW, Inputs, assert_earned, assert_equal, error, evaluate, packed_positions


def turn(*, x: Tensor, impl: str = "triton", **options: Any) -> tuple[Tensor, None]:
    positions = packed_positions(x.shape[1], first=7)[: x.shape[0]].to(x.device)
    return rotary(x, positions, **options, impl=impl), None


@pytest.mark.parametrize(
    ("shape", "rotary_dim"), [((1, 1, 1, 2), None), ((2, 17, 3, 60), None), ((2, 9, 2, 100), 36), ((2, 33, 1, 16), 4)]
)
def test_triton_earns_its_tolerance(shape: tuple[int, ...], rotary_dim: int | None) -> None:
    assert_earned(turn, {"x": torch.randn(shape)}, impl="triton", theta=500.0, rotary_dim=rotary_dim)


@pytest.mark.parametrize("features", [16, 60, 64, 100, 128, 256])
@pytest.mark.parametrize("time", [pytest.param(time, marks=SLOW) for time in (1, 63, 257, 1025)])
def test_triton_earns_its_tolerance_on_the_grid(time: int, features: int) -> None:
    assert_earned(turn, {"x": torch.randn(2, time, 3, features)}, impl="triton")


def test_bf16_is_turned_in_fp32() -> None:
    x = torch.randn(2, 30, 2, 16).bfloat16().to(DEVICE)
    found, exact = turn(x=x)[0], turn(x=x.float(), impl="reference")[0]
    assert found.dtype == torch.bfloat16
    assert error(found, exact) <= 1.05 * error(exact.bfloat16(), exact)


def test_far_positions() -> None:
    """The angles of a late token are not rounded to fp32, where the formula's are off by 1e-3."""
    x = torch.randn(1, 1, 1, 128, device=DEVICE)
    for position in (100_000, 1_000_000):
        there = torch.tensor([[position]], device=DEVICE)
        exact = rotary(x.double(), there, impl="reference")
        assert error(rotary(x, there, impl="triton"), exact) <= 1e-6


def test_slices_of_a_wider_tensor() -> None:
    x = torch.randn(2, 5, 3, 8)
    wide = torch.randn(2, 5, 72)
    wide[..., 24:48] = x.flatten(-2)
    expected = evaluate(turn, {"x": x})
    assert_equal(evaluate(turn, {"x": wide[..., 24:48].unflatten(-1, (3, 8))}), expected, 0.0)
    permuted: Inputs = {"x": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)}
    assert_equal(evaluate(turn, permuted), expected, 0.0)


def test_trap_grid_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first axis of a grid may be larger than 65,535."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(triton, "_rotate", Recorder())
    monkeypatch.setattr(triton, "TILE", 1)
    positions = torch.zeros(2, 35_000, dtype=torch.int64, device=DEVICE)
    rotary(torch.zeros(2, 35_000, 1, 2, device=DEVICE), positions, impl="triton")
    assert grids == [(70_000,)]


def test_turning_by_the_same_angle_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that forgets to turn the other way."""
    real = triton.rotate
    monkeypatch.setattr(triton, "rotate", lambda *arguments: real(*arguments[:-1], False))
    with pytest.raises(AssertionError, match="d x"):
        assert_earned(turn, {"x": torch.randn(2, 5, 1, 8)}, impl="triton")


def test_gradcheck() -> None:
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return turn(x=x, rotary_dim=4)[0]

    if DEVICE == "cuda":
        with pytest.raises(ValueError, match=r"x has dtype torch\.float64; .* use 'reference'"):
            function(x)
    else:
        assert torch.autograd.gradcheck(function, x, fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_whole_and_is_checkpointed(impl: str) -> None:
    x = torch.randn(2, 5, 2, 8, device=DEVICE, requires_grad=True)
    positions = packed_positions(5).to(DEVICE)

    def function(x: Tensor) -> Tensor:
        return rotary(x, positions, rotary_dim=4, impl=impl)

    def gradients(function: Any) -> list[Tensor]:
        y = function(x)
        return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), x)]

    expected = gradients(function)
    torch._dynamo.reset()
    with torch.autocast(DEVICE, torch.bfloat16):
        autocast = gradients(function)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found in (gradients(compiled), gradients(partial(checkpoint, function, use_reentrant=False)), autocast):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if impl == "triton":
        torch.library.opcheck(triton.rotate, (x, positions, 1e4, 4, False))
