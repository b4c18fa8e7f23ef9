"""linear_cross_entropy: its forms against torch's cross_entropy and as registered ops, and no full logits."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ops import linear_cross_entropy
from ops.linear_cross_entropy import chunked, vocabulary_slice
from ops.linear_cross_entropy import triton as kernels
from ops.linear_cross_entropy.tiles import tiles, write_product
from tests.ops.compare import DEVICE, SLOW, Inputs, assert_earned, assert_equal, error, evaluate
from tests.ops.largest import LargestTensor
from tests.ops.vocabulary_slices import assert_slices_make_the_whole

IMPLS = ("reference", "chunked")
TIERS = ("chunked", "triton")
# Vocabularies of one tile, of exactly two, and of two and a bit; tokens likewise.
SIZES = [(1, 1), (7, 50), (20, 64), (32, 70), (41, 131)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 tokens by 32 entries, so that small cases have several; of 16 by 64 where they are interpreted."""
    monkeypatch.setattr(chunked, "CPU_TILE", (16, 32))
    monkeypatch.setattr(chunked, "GPU_TILE", (16, 32))
    monkeypatch.setattr(kernels, "TILE", (16, 64))


def make_inputs(tokens: int, entries: int, dtype: torch.dtype = torch.float64) -> Inputs:
    return {"x": torch.randn(tokens, 12, dtype=dtype), "weight": torch.randn(entries, 12, dtype=dtype)}


def make_labels(tokens: int, entries: int) -> Tensor:
    labels = torch.randint(0, entries, (tokens,))
    labels[0], labels[-1] = 0, entries - 1
    labels[1:2] = -100
    return labels


def both(x: Tensor, weight: Tensor, *, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(x, weight, labels.to(x.device), **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_is_torch_cross_entropy(cap: float | None, impl: str) -> None:
    inputs, labels = make_inputs(41, 131), make_labels(41, 131)
    logits = inputs["x"] @ inputs["weight"].T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    nll, log_z = linear_cross_entropy(**inputs, labels=labels, logit_soft_cap=cap, impl=impl)
    torch.testing.assert_close(nll, cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(log_z, torch.where(labels == -100, 0, logits.logsumexp(-1)))


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("tokens", "entries"), SIZES)
def test_chunked_equals_reference(tokens: int, entries: int, cap: float | None) -> None:
    op = partial(both, labels=make_labels(tokens, entries), logit_soft_cap=cap)
    inputs = make_inputs(tokens, entries)
    assert_equal(evaluate(op, inputs, impl="chunked"), evaluate(op, inputs, impl="reference"), 1e-13)
    assert_earned(op, inputs)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    entries=st.integers(1, 90),
    tile=st.tuples(st.integers(1, 50), st.integers(1, 100)),
    seed=st.integers(0, 99),
)
def test_any_size_and_tile(tokens: int, entries: int, tile: tuple[int, int], seed: int) -> None:
    """Equal to the reference; and tokens in another order give the same results in that order."""
    torch.manual_seed(seed)
    inputs, labels, order = make_inputs(tokens, entries), make_labels(tokens, entries), torch.randperm(tokens)
    with mock.patch.object(chunked, "CPU_TILE", tile), mock.patch.object(chunked, "GPU_TILE", tile):
        found = linear_cross_entropy(**inputs, labels=labels, impl="chunked")
        permuted = linear_cross_entropy(inputs["x"][order], inputs["weight"], labels[order], impl="chunked")
    for a, b, c in zip(found, permuted, linear_cross_entropy(**inputs, labels=labels, impl="reference")):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(a[order], b)


@pytest.mark.parametrize(
    ("name", "mutant", "wrong"),
    [
        ("tiles", lambda *shape: list(tiles(*shape))[:-1], "d weight"),  # the last entries
        ("add_product", write_product, "d x"),  # sums over tiles
        ("_columns", lambda labels, n: (torch.zeros_like(labels)[:, None], labels < -1), "output"),  # labels' logits
        ("add_product", lambda total, *_: total.zero_(), "d weight"),
    ],
)
def test_a_dropped_term_is_caught(name: str, mutant: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, inputs = partial(both, labels=make_labels(41, 131)), make_inputs(41, 131)
    expected = evaluate(op, inputs, impl="reference")
    monkeypatch.setattr(chunked, name, mutant)
    assert error(evaluate(op, inputs, impl="chunked")[wrong], expected[wrong]) > 1e-3


@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradcheck(cap: float | None) -> None:
    inputs, labels = make_inputs(5, 40), torch.tensor([0, 39, -100, 31, 32])
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda x, w: both(x, w, labels=labels, logit_soft_cap=cap), leaves, fast_mode=True)


def test_large_logits_do_not_overflow() -> None:
    inputs, labels = make_inputs(20, 64, torch.float32), make_labels(20, 64)
    inputs["x"] *= 1e4
    results = evaluate(partial(both, labels=labels), inputs, impl="chunked")
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert_earned(partial(both, labels=labels), inputs)


def test_tokens_without_target_have_no_part_in_it() -> None:
    inputs, labels = make_inputs(20, 64), torch.full((20,), -100)
    results = evaluate(partial(both, labels=labels), inputs, impl="chunked")
    assert all((tensor == 0).all() for tensor in results.values())


def test_any_leading_shape() -> None:
    inputs, labels = make_inputs(24, 64), make_labels(24, 64)
    flat = linear_cross_entropy(**inputs, labels=labels)
    shaped = linear_cross_entropy(inputs["x"].view(2, 3, 4, 12), inputs["weight"], labels.view(2, 3, 4))
    for a, b in zip(flat, shaped):
        torch.testing.assert_close(a.view(2, 3, 4), b, rtol=0, atol=0)
    single = linear_cross_entropy(inputs["x"][0], inputs["weight"], labels[0])
    torch.testing.assert_close(single, (flat[0][0], flat[1][0]))


def test_full_logits_never_exist() -> None:
    tokens, entries = 64, 512
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(tokens, entries).items()}
    kept: list[int] = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.numel()) or z, lambda z: z),
    ):
        nll, log_z = linear_cross_entropy(**inputs, labels=make_labels(tokens, entries))
        (nll + log_z.square()).sum().backward()
    assert largest.numel == entries * 12 < tokens * entries  # the gradient of the weight
    # x and weight; labels, log-sum-exp, where there is a target, twice; the square for the loss
    assert sorted(kept) == [tokens] * 5 + [tokens * 12, entries * 12]


@pytest.mark.parametrize(("entries", "slices"), [(131, 2), (131, 3), (131, 5), (33, 5), (8, 5)])
@pytest.mark.parametrize("impl", IMPLS)
def test_slices_of_the_vocabulary_make_the_whole(impl: str, entries: int, slices: int) -> None:
    assert_slices_make_the_whole(make_inputs(20, entries), make_labels(20, entries), slices, impl=impl)


def test_a_wrong_start_of_a_slice_is_caught() -> None:
    with pytest.raises(AssertionError):
        assert_slices_make_the_whole(make_inputs(20, 33), make_labels(20, 33), 3, impl="chunked", first=1)


def loss(x: Tensor, weight: Tensor, labels: Tensor, impl: str) -> Tensor:
    nll, log_z = linear_cross_entropy(x, weight, labels, logit_soft_cap=3.0, impl=impl)
    return nll.sum() + 0.1 * log_z.square().sum()


@pytest.mark.parametrize("impl", TIERS)
def test_compiles_whole_and_recomputes(impl: str) -> None:
    """torch.compile without a break in the graph, and activation checkpointing, change no result."""
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in make_inputs(17, 70, torch.float32).values()]
    labels = make_labels(17, 70).to(DEVICE)
    expected = loss(*leaves, labels, impl)
    gradients = torch.autograd.grad(expected, leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    recomputed = partial(checkpoint, loss, use_reentrant=False)
    for form in (compiled, recomputed):
        found = form(*leaves, labels, impl)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaves), gradients):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", TIERS)
def test_registered_ops(impl: str) -> None:
    x, weight = (tensor.to(DEVICE).requires_grad_() for tensor in make_inputs(3, 5, torch.float32).values())
    labels = torch.tensor([0, 4, -100], device=DEVICE)
    op = getattr(torch.ops.rondo, f"linear_cross_entropy_{impl}_forward")
    for cap in (None, 3.0):
        torch.library.opcheck(op, (x, weight, labels, 0, cap, torch.float32))
    numbers = torch.randn(3, 3, device=DEVICE).unbind()
    op = getattr(torch.ops.rondo, f"linear_cross_entropy_{impl}_backward")
    torch.library.opcheck(op, (*numbers, x.detach(), weight.detach(), labels, 0, None, torch.float32))


@pytest.mark.parametrize("impl", ["chunked", pytest.param("triton", marks=SLOW)])
def test_transposed_weight_compiles(impl: str) -> None:
    """Gradients are contiguous, as the fake implementation says, however their arguments lie in memory."""
    x, weight = torch.randn(9, 12, device=DEVICE), torch.randn(12, 30, device=DEVICE, requires_grad=True)
    labels = torch.arange(9, device=DEVICE)

    def gradient(form: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(form(x, weight.T, labels, impl), weight)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(loss))


@pytest.mark.parametrize("impl", ["reference", *TIERS])
def test_autocast_rounds_operands_and_nothing_else(impl: str) -> None:
    """Products of operands rounded to bf16, summed in fp32; gradients in the dtypes of the arguments."""
    inputs, labels = make_inputs(33, 130, torch.float32), make_labels(33, 130)
    op = partial(both, labels=labels)
    rounded = {name: tensor.bfloat16().double() for name, tensor in inputs.items()}
    exact = evaluate(op, rounded, impl="reference")
    with torch.autocast(DEVICE, torch.bfloat16):
        results = evaluate(op, inputs, impl=impl)
    assert {tensor.dtype for tensor in results.values()} == {torch.float32}
    assert error(results["output"], exact["output"]) <= 1e-6
    assert error(results["state 0"], exact["state 0"]) <= 1e-6
    # The gradient of the logits is rounded to bf16 before its two products.
    assert error(results["d x"], exact["d x"]) <= 2**-8
    assert error(results["d weight"], exact["d weight"]) <= 2**-8


def test_bf16_arguments() -> None:
    inputs, labels = make_inputs(20, 70, torch.bfloat16), make_labels(20, 70)
    results = evaluate(partial(both, labels=labels), inputs, impl="chunked")
    assert (results["output"].dtype, results["d x"].dtype, results["d weight"].dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    exact = evaluate(partial(both, labels=labels), {name: z.double() for name, z in inputs.items()}, impl="reference")
    assert error(results["output"], exact["output"]) <= 1e-6
    assert error(results["d weight"], exact["d weight"]) <= 2**-7


def test_num_entries_beyond_the_slice() -> None:
    inputs, labels = make_inputs(3, 5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_entries is 6; must be 0 \.\.\. N = 5"):
        vocabulary_slice(**inputs, labels=labels, num_entries=6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(3, 11)}, r"x has shape \[3, 11\]; must be \[..., D\] = \[3, 12\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "x has shape"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels have dtype torch.int32; must be torch.int64"),
        ({"weight": torch.zeros(5, 1, 12)}, "weight has shape"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap is 0.0; must be > 0"),
        ({"impl": "fla"}, "choose one of"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3, 5) | {"labels": torch.zeros(3, dtype=torch.int64)} | wrong
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
