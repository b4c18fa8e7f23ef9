"""linear_cross_entropy's kernels against the reference."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ops import linear_cross_entropy
from ops.linear_cross_entropy import chunked
from ops.linear_cross_entropy import triton as kernels
from tests.ops.compare import (
    DEVICE,
    SLOW,
    Inputs,
    assert_earned,
    assert_earned_bf16,
    assert_equal,
    error,
    evaluate,
)
from tests.ops.largest import LargestTensor
from tests.ops.vocabulary_slices import assert_slices_make_the_whole

TIERS = ("chunked", "triton")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 tokens by 64 entries, 32 of them at a time, so that small cases have several of each."""
    monkeypatch.setattr(chunked, "CPU_TILE", (16, 64))
    monkeypatch.setattr(chunked, "GPU_TILE", (16, 64))
    monkeypatch.setattr(kernels, "TILE", (16, 64))
    monkeypatch.setattr(kernels, "BV", 32)


def make_inputs(tokens: int, entries: int, width: int = 12, dtype: torch.dtype = torch.float32) -> Inputs:
    return {"x": torch.randn(tokens, width, dtype=dtype), "weight": torch.randn(entries, width, dtype=dtype)}


def make_labels(tokens: int, entries: int) -> Tensor:
    labels = torch.randint(0, entries, (tokens,))
    labels[0], labels[-1] = 0, entries - 1
    labels[1:2] = -100
    return labels


def both(x: Tensor, weight: Tensor, *, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(x, weight, labels.to(x.device), **options)


def op_on(tokens: int, entries: int, cap: float | None = None) -> Callable[..., Any]:
    return partial(both, labels=make_labels(tokens, entries), logit_soft_cap=cap)


# One tile, exactly two of either, two and a bit; vocabularies that are no multiple of anything.
@pytest.mark.parametrize(
    ("tokens", "entries", "cap"),
    [(1, 1, None), (1, 2, 3.0), (7, 50, 30.0), (16, 64, None), (32, 128, 3.0), (17, 131, None), (33, 70, 3.0)],
)
def test_fp32_error_is_earned(tokens: int, entries: int, cap: float | None) -> None:
    assert_earned(op_on(tokens, entries, cap), make_inputs(tokens, entries), impl="triton")


@pytest.mark.parametrize(("tokens", "entries", "cap"), [(7, 50, 3.0), (17, 131, None), (33, 70, 3.0)])
def test_bf16_error_is_earned(tokens: int, entries: int, cap: float | None) -> None:
    assert_earned_bf16(op_on(tokens, entries, cap), make_inputs(tokens, entries))


@pytest.mark.parametrize(
    ("tokens", "entries", "cap"),
    [pytest.param(*case, marks=SLOW) for case in [(257, 1000, None), (257, 1000, 30.0), (513, 2050, 30.0)]],
)
def test_larger_sizes(tokens: int, entries: int, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", (512, 2048))
    monkeypatch.setattr(kernels, "BV", 512)
    inputs = make_inputs(tokens, entries, width=100)
    assert_earned(op_on(tokens, entries, cap), inputs, impl="triton")
    assert_earned_bf16(op_on(tokens, entries, cap), inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels take float64 under the interpreter only")
@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradcheck(cap: float | None) -> None:
    inputs, labels = make_inputs(4, 70, 2, torch.float64), torch.tensor([0, 69, -100, 63])
    inputs["weight"] = inputs["weight"][-9:]
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def op(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(x, weight, labels % 9 - 100 * (labels < 0), logit_soft_cap=cap, impl="triton")

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter computes in float64")
def test_float64_is_refused_on_a_gpu() -> None:
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(4, 9, dtype=torch.float64).items()}
    with pytest.raises(ValueError, match="'triton' needs fp32 or below; choose 'chunked'"):
        both(**inputs, labels=torch.zeros(4, dtype=torch.int64), impl="triton")


@pytest.mark.parametrize(("entries", "slices"), [(131, 2), (131, 3), (33, 5), (8, 5)])
def test_slices_of_the_vocabulary_make_the_whole(entries: int, slices: int) -> None:
    assert_slices_make_the_whole(make_inputs(9, entries), make_labels(9, entries), slices, impl="triton")


@pytest.mark.parametrize("cap", [None, 3.0])
def test_large_logits_do_not_overflow(cap: float | None) -> None:
    """Logits of 1e5: exponentials overflow, and the soft cap's tanh is 1 to the last bit."""
    inputs, op = make_inputs(17, 70), op_on(17, 70, cap)
    inputs["x"] *= 1e4
    results = evaluate(op, inputs, impl="triton")
    assert all(tensor.isfinite().all() for tensor in results.values())
    expected = evaluate(op, inputs, impl="reference")
    assert error(results["output"], expected["output"]) <= 1e-6
    assert error(results["state 0"], expected["state 0"]) <= 1e-6


def test_tokens_without_target_have_no_part_in_it() -> None:
    inputs = make_inputs(17, 70)
    results = evaluate(partial(both, labels=torch.full((17,), -100)), inputs, impl="triton")
    assert all((tensor == 0).all() for tensor in results.values())


def test_non_contiguous_arguments() -> None:
    wide = {name: torch.randn(2 * n, 24) for name, n in (("x", 17), ("weight", 70))}
    labels = torch.stack([make_labels(17, 70), torch.full((17,), 10**9)], dim=1)

    def op(x: Tensor, weight: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(x[::2, ::2], weight.T[1::2, 1::2].T, labels.to(x.device)[:, 0], impl=impl)

    assert_earned(op, wide, impl="triton")


def test_grid_limit_65535() -> None:
    """However many tokens there are, programs lie on the first axis of the grid, and no two axes share the rows."""
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda logits, *_, BT, **__: grids.append((grid, len(logits), BT))

    tokens = 70_000
    with mock.patch.object(kernels, "TILE", (2**20, 64)), mock.patch.object(kernels, "_summarise_kernel", Kernel()):
        x, weight = torch.zeros(tokens, 1, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
        kernels.vocabulary_slice(x, weight, torch.zeros(tokens, dtype=torch.int64, device=DEVICE), 0, None)
    ((grid, rows, block),) = grids
    assert len(grid) == 1
    assert (grid[0] - 1) * block < rows == tokens <= grid[0] * block


@pytest.mark.skipif(DEVICE == "cpu", reason="interpreting 65537 programs takes a quarter of an hour")
def test_more_programs_than_65535(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 65536 * kernels.BT + 1
    monkeypatch.setattr(kernels, "TILE", (2**20, 64))
    monkeypatch.setattr(chunked, "GPU_TILE", (2**20, 64))
    inputs = make_inputs(tokens, 3, 2)
    op = op_on(tokens, 3)
    assert_equal(evaluate(op, inputs, impl="triton"), evaluate(op, inputs, impl="chunked"), 1e-5)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_gradient_in_place_and_in_a_narrow_buffer(cap: float | None) -> None:
    logits = 3 * torch.randn(5, 70, device=DEVICE)
    labels = torch.tensor([1, 69, 70, -100, 0], device=DEVICE)
    dlabel_logit, dlog_sum_exp = torch.randn(2, 5, device=DEVICE)
    log_sum_exp = torch.full_like(dlabel_logit, 9.0)
    narrow = torch.empty_like(logits, dtype=torch.bfloat16)
    for dlogits in (narrow, logits):  # the second one writes over the logits
        kernels._gradient_kernel[(1,)](
            logits, dlogits, labels, dlabel_logit, dlog_sum_exp, log_sum_exp, 5, 70, 70, 0, CAP=cap, BT=8, BV=32
        )
    # A GPU rounds to bf16, which errs by 2^-9 at most; the interpreter cuts off, which errs by 2^-8.
    torch.testing.assert_close(narrow.float(), logits, rtol=2**-7, atol=1e-9)
    assert logits.isfinite().all()


@pytest.mark.parametrize("impl", TIERS)
def test_full_logits_never_exist(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", (16, 32))  # the interpreter copies a tile as 4 bytes a number
    tokens, entries = 32, 256
    inputs = {name: z.to(DEVICE).requires_grad_() for name, z in make_inputs(tokens, entries).items()}
    with LargestTensor() as largest:
        nll, log_z = both(**inputs, labels=make_labels(tokens, entries), impl=impl)
        (nll + log_z.square()).sum().backward()
    assert largest.numel == entries * 12 < tokens * entries  # the gradient of the weight


@pytest.mark.parametrize(
    "mutant",
    ["a tile dropped", "sum over tiles dropped", "label's term dropped", "normaliser's term dropped", "slope dropped"],
)
def test_a_dropped_term_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, tiles = kernels._gradient_kernel, kernels.tiles

    class Mutant:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(
                logits: Tensor, dlogits: Tensor, labels: Tensor, *terms: Any, CAP: float, **options: Any
            ) -> None:
                dlabel_logit, dlog_sum_exp, *rest = terms
                if mutant.startswith("label"):
                    dlabel_logit = torch.zeros_like(dlabel_logit)
                if mutant.startswith("normaliser"):
                    dlog_sum_exp = torch.zeros_like(dlog_sum_exp)
                cap = 1e9 if mutant.startswith("slope") else CAP
                kernel[grid](logits, dlogits, labels, dlabel_logit, dlog_sum_exp, *rest, CAP=cap, **options)

            return launch

    if mutant.startswith("a tile"):
        monkeypatch.setattr(kernels, "tiles", lambda *shape: list(tiles(*shape))[:-1])
    if mutant.startswith("sum"):
        monkeypatch.setattr(kernels, "add_product", kernels.write_product)
    monkeypatch.setattr(kernels, "_gradient_kernel", Mutant())
    with pytest.raises(AssertionError, match="error"):
        assert_earned(op_on(17, 70, 3.0), make_inputs(17, 70), impl="triton")
