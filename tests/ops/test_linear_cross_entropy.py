"""linear_cross_entropy: both forms against torch's cross_entropy, and that full logits never exist."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ops import linear_cross_entropy
from ops.linear_cross_entropy import chunked
from ops.linear_cross_entropy.chunked import LinearCrossEntropy
from tests.ops.compare import Inputs, assert_earned, assert_equal, error, evaluate
from tests.ops.largest import LargestTensor

IMPLS = ("reference", "chunked")
# Vocabularies of one tile, of exactly two, and of two and a bit; tokens likewise.
SIZES = [(1, 1), (7, 50), (20, 64), (32, 70), (41, 131)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 tokens by 32 entries, so that small cases have several."""
    monkeypatch.setattr(chunked, "CPU_TILE", (16, 32))


def make_inputs(tokens: int, entries: int, dtype: torch.dtype = torch.float64) -> Inputs:
    return {"x": torch.randn(tokens, 12, dtype=dtype), "weight": torch.randn(entries, 12, dtype=dtype)}


def make_labels(tokens: int, entries: int) -> Tensor:
    labels = torch.randint(0, entries, (tokens,))
    labels[0], labels[-1] = 0, entries - 1
    labels[1:2] = -100
    return labels


def both(x: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(x, weight, **options)


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


@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradcheck(cap: float | None) -> None:
    inputs, labels = make_inputs(5, 40), torch.tensor([0, 39, -100, 31, 32])
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda x, w: LinearCrossEntropy.apply(x, w, labels, cap, torch.float64), leaves)


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
    # x and weight, labels, log_z; its square for the loss
    assert sorted(kept) == [tokens] * 3 + [tokens * 12, entries * 12]


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_rounds_operands_and_nothing_else(impl: str) -> None:
    """Products of operands rounded to bf16, summed in fp32; gradients in the dtypes of the arguments."""
    inputs, labels = make_inputs(64, 200, torch.float32), make_labels(64, 200)
    op = partial(both, labels=labels)
    rounded = {name: tensor.bfloat16().double() for name, tensor in inputs.items()}
    exact = evaluate(op, rounded, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(3, 11)}, r"x has shape \[3, 11\]; must be \[..., D\] = \[3, 12\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "x has shape"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels have dtype torch.int32; must be torch.int64"),
        ({"weight": torch.zeros(5, 1, 12)}, "weight has shape"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap is 0.0; must be > 0"),
        ({"impl": "triton"}, "choose one of"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3, 5) | {"labels": torch.zeros(3, dtype=torch.int64)} | wrong
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
