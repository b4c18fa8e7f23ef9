"""rms_norm against torch's own, and its gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import silu

from ops import rms_norm
from tests.ops.compare import DEVICE, FP32_UNIT, error

IMPLS = ["reference", "chunked", "triton"]


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(7,), (3, 5, 64)])
def test_is_torch_rms_norm(shape: tuple[int, ...], impl: str) -> None:
    x, weight, gate = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    for eps in (1e-6, 1e-2):
        torch.testing.assert_close(rms_norm(x, weight, eps=eps, impl=impl), torch_rms_norm(x, shape[-1:], weight, eps))
    expected = torch_rms_norm(x, shape[-1:], 1 + weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, one_plus_weight=True, impl=impl), expected)
    gated = rms_norm(x, weight, one_plus_weight=True, gate=gate, impl=impl)
    torch.testing.assert_close(gated, expected * silu(gate))


def test_gradcheck() -> None:
    x, weight, gate = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (4,), (2, 3, 4))
    )
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(rms_norm, (x.detach()[0, 0].requires_grad_(), weight))
    assert torch.autograd.gradcheck(lambda x, w, g: rms_norm(x, w, one_plus_weight=True, gate=g), (x, weight, gate))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shape", "dims"), [((3, 5, 8), (0, 1)), ((2, 5, 3, 8), (1, 2)), ((2, 5, 3, 8), (0, 3))])
def test_gradients_that_are_permuted_in_memory(shape: tuple[int, ...], dims: tuple[int, int], impl: str) -> None:
    x, weight, gate = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    factor = torch.randn(shape).transpose(*dims).contiguous()

    def gradients(y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y.transpose(*dims) * factor).sum(), leaves)

    leaves = [z.requires_grad_() for z in (x, weight, gate)]
    expected = torch_rms_norm(x, shape[-1:], weight, 1e-6)
    torch.testing.assert_close(gradients(rms_norm(x, weight, impl=impl), leaves[:2]), gradients(expected, leaves[:2]))
    expected = torch_rms_norm(x, shape[-1:], weight, 1e-6) * silu(gate)
    torch.testing.assert_close(
        gradients(rms_norm(x, weight, gate=gate, impl=impl), leaves), gradients(expected, leaves)
    )


def test_fp32_error_is_earned() -> None:
    """Outputs and gradients err at most twice as much as those of torch's norm."""
    x, weight, dy = torch.randn(64, 192), torch.randn(192), torch.randn(64, 192)

    def run(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [z.detach().to(dtype).requires_grad_() for z in (x, weight)]
        y = norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch_rms_norm(x, (192,), weight, 1e-6)

    for ours, yardstick, exact in zip(
        run(rms_norm, torch.float32), run(plain, torch.float32), run(plain, torch.float64)
    ):
        assert error(ours, exact) <= max(FP32_UNIT, 2 * error(yardstick, exact))


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_rows(impl: str) -> None:
    """A row of zeros, and rows whose squares are near the ends of fp32's range."""
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e18), torch.full((8,), 1e-20)]).requires_grad_()
    y = rms_norm(x, torch.ones(8), impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y[:2], torch.stack([torch.zeros(8), torch.ones(8)]))
    assert y.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_is_computed_in_fp32(impl: str) -> None:
    x, weight = torch.randn(16, 64).bfloat16().requires_grad_(), torch.randn(64, requires_grad=True)
    y = rms_norm(x, weight, impl=impl)
    torch.testing.assert_close(y, rms_norm(x.float(), weight, impl=impl).bfloat16(), rtol=0, atol=0)
    dx, dweight = torch.autograd.grad(y.float().sum(), (x, weight))
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("x", "weight", "gate", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2), None, r"weight has shape \[2\]; must be \[D\] = \[3\]"),
        (torch.zeros(2, 3), torch.zeros(3), torch.zeros(3), "gate has shape"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), None, "x has dtype torch.int64"),
        (torch.zeros(()), torch.zeros(1), None, "x is a scalar"),
    ],
)
def test_bad_arguments(x: Tensor, weight: Tensor, gate: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, gate=gate)
