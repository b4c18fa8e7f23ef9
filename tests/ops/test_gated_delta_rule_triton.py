"""gated_delta_rule's Triton kernels: interpreted on a CPU, compiled on a GPU."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ops import Layout, gated_delta_rule
from ops.gated_delta_rule import triton as tier
from ops.gated_delta_rule.decays import chunk_decays, layout_masks
from tests.ops.compare import (
    DEVICE,
    LENGTHS,
    SLOW,
    Inputs,
    assert_earned,
    assert_earned_bf16,
    assert_equal,
    assert_packed_equals_separate,
    assert_split_equals_whole,
    evaluate,
    extreme_decays,
    layouts,
    packed_positions,
)
from tests.ops.documents import assert_equals_reference, positions
from tests.ops.test_gated_delta_rule import PARALLEL_KEYS_TOLERANCE, rule_from

rule = partial(gated_delta_rule, output_final_state=True)
triton_rule = partial(rule, impl="triton")
HEAD_DIMS = (16, 60, 64, 100, 128, 256)
KINDS = ("none", "packed", "continued")


def make_inputs(
    time: int, *, batch: int = 1, heads: int = 1, group: int = 1, keys: int = 16, values: int = 16
) -> Inputs:
    """Keys of norm 1, and beta up to 1.9, so that rounding to bf16 leaves beta |k|^2 below 2."""
    value_heads = heads * group
    return {
        "q": torch.randn(batch, time, heads, keys),
        "k": normalize(torch.randn(batch, time, heads, keys), dim=-1),
        "v": torch.randn(batch, time, value_heads, values),
        "log_decay": -torch.rand(batch, time, value_heads) * 0.3,
        "beta": 1.9 * torch.rand(batch, time, value_heads),
        "initial_state": torch.randn(batch, value_heads, keys, values),
    }


def row(time: int, kind: str) -> Layout | None:
    """One row of `compare.layouts`."""
    layout = layouts(time)[kind]
    return None if layout is None else Layout(layout.positions[:1])


# (T, H, HV / H, K, V, documents): one chunk and several, blocks of keys and of values, whole and in part.
FP32_CASES = [
    pytest.param(1, 1, 2, 16, 3, "packed", marks=SLOW),
    pytest.param(17, 1, 1, 20, 16, "none", marks=SLOW),
    (33, 1, 2, 16, 16, "packed"),
    pytest.param(40, 1, 1, 36, 34, "continued", marks=SLOW),
]
BF16_CASES = [
    pytest.param(1, 1, 4, 16, 16, "none", marks=SLOW),
    (65, 1, 2, 16, 16, "packed"),
    (64, 1, 1, 70, 80, "continued"),
    pytest.param(130, 1, 1, 16, 16, "none", marks=SLOW),
]
# A token's output and gradients hang on one product of its q and k: of few tokens, a rounding decides whose error is
# larger.
TOKENS = 16
GRID = [
    *(
        (time, max(1, TOKENS // time), 1 + i % 3, HEAD_DIMS[i % 6], HEAD_DIMS[(i + 2) % 6], KINDS[i % 3])
        for i, time in enumerate(LENGTHS)
    ),
    *((100, 1, 1, width, 2 * width, KINDS[i % 3]) for i, width in enumerate(HEAD_DIMS)),
]


@pytest.mark.parametrize(
    ("time", "heads", "group", "keys", "values", "kind"),
    FP32_CASES + [pytest.param(*case, marks=SLOW) for case in GRID],
)
def test_fp32_error_is_earned(time: int, heads: int, group: int, keys: int, values: int, kind: str) -> None:
    inputs = make_inputs(time, heads=heads, group=group, keys=keys, values=values)
    assert_earned(rule, inputs, impl="triton", layout=row(time, kind))


@pytest.mark.parametrize(
    ("time", "heads", "group", "keys", "values", "kind"),
    BF16_CASES + [pytest.param(*case, marks=SLOW) for case in GRID],
)
def test_bf16_error_is_earned(time: int, heads: int, group: int, keys: int, values: int, kind: str) -> None:
    inputs = make_inputs(time, heads=heads, group=group, keys=keys, values=values)
    assert_earned_bf16(rule, inputs, layout=row(time, kind))


@pytest.mark.parametrize("kind", ["packed", pytest.param("continued", marks=SLOW)])
def test_extreme_decays_and_strengths(kind: str) -> None:
    """Decays of 1, exp(-1e4) and exactly 0 beside ordinary ones; tokens that write nothing, replace or reflect."""
    inputs = make_inputs(20, group=3)
    inputs["log_decay"] = extreme_decays(*inputs["log_decay"].shape)
    inputs["beta"] = torch.tensor([0.0, 1.0, 2.0])[torch.randint(0, 3, inputs["beta"].shape)]
    assert_earned(rule, inputs, impl="triton", layout=row(20, kind))


def test_padding_rows_do_not_overflow() -> None:
    """flash-linear-attention loads a log decay of 0 beyond T and takes exp(0 - sum): here exp(+132), times 0."""
    inputs = make_inputs(33)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -4.0)
    assert_earned(rule, inputs, impl="triton")


@pytest.mark.parametrize(("time", "group"), [(17, 1), pytest.param(33, 4, marks=SLOW)])
def test_gate_of_one(time: int, group: int) -> None:
    """flash-linear-attention #104, #389: DeltaNet, log decays of 0 over several chunks."""
    inputs = make_inputs(time, group=group)
    inputs["log_decay"] = torch.zeros_like(inputs["log_decay"])
    assert_earned(rule, inputs, impl="triton")


def test_unnormalised_keys() -> None:
    """flash-linear-attention #537: keys of norm 30, with beta as small as it takes."""
    inputs = make_inputs(40)
    inputs["k"], inputs["beta"] = 30 * inputs["k"], inputs["beta"] / 900
    assert_earned(rule, inputs, impl="triton")


@pytest.mark.parametrize("size", [pytest.param(32, marks=SLOW), 64])
def test_inverse_by_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 in the longer chunks of narrow dtypes, whose inverses are put together from blocks."""
    sizes = tier.tile_sizes(16, 16, torch.float32)._replace(chunk=size)
    monkeypatch.setattr(tier, "tile_sizes", lambda *_: sizes)
    inputs, layout = make_inputs(70), row(70, "continued")
    expected = evaluate(rule, inputs, layout=layout, impl="reference")
    assert_equal(evaluate(triton_rule, inputs, layout=layout), expected, 2e-6)


@SLOW
def test_strength_near_two_with_parallel_keys() -> None:
    inputs = make_inputs(65)
    noise = 0.1 * torch.randn_like(inputs["k"])
    inputs["k"] = normalize(torch.ones_like(noise) + noise, dim=-1)
    inputs["beta"] = torch.full_like(inputs["beta"], 1.999)
    inputs["log_decay"] = inputs["log_decay"] * 0.01
    exact = evaluate(rule, {name: tensor.double() for name, tensor in inputs.items()}, impl="reference")
    assert_equal(evaluate(triton_rule, inputs), exact, PARALLEL_KEYS_TOLERANCE)


def test_reverse_associative_scan() -> None:
    """Triton #4362: the decays out of a chunk are sums to its end, of which a reversed scan would get some wrong."""
    inputs, layout = make_inputs(32), row(32, "continued")
    device = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    positions = None if layout is None else layout.positions.to(DEVICE)
    _, _, _, carry, *_ = tier.forward(*device.values(), positions, 1.0)
    expected = chunk_decays(
        inputs["log_decay"].view(1, 2, 16, 1).permute(1, 0, 3, 2), layout_masks(layout, 16, torch.float32)
    )
    torch.testing.assert_close(carry[0, 0, :, 0].cpu(), expected.carry_in[:, 0, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(carry[0, 0, :, 1].cpu(), expected.carry_out[:, 0, 0], rtol=1e-5, atol=0)


@SLOW
@pytest.mark.parametrize("time", [4, 34])
def test_gradcheck(time: int) -> None:
    """Float64, which the kernels take only where they are interpreted."""
    leaves = {n: z.double().to(DEVICE).requires_grad_() for n, z in make_inputs(time, keys=3, values=2).items()}
    layout = Layout(packed_positions(time, first=2, cuts=(3,))[:1].to(DEVICE))

    def call(*tensors: Tensor) -> Any:
        return triton_rule(**dict(zip(leaves, tensors)), layout=layout)

    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="float64 inputs; 'triton' computes in fp32 on a GPU: choose 'chunked'"):
            call(*leaves.values())
    else:
        assert torch.autograd.gradcheck(call, list(leaves.values()), fast_mode=True, check_undefined_grad=False)


def without_state(inputs: Inputs) -> Inputs:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items() if name != "initial_state"}


@SLOW
def test_packed_equals_separate() -> None:
    assert_packed_equals_separate(rule, without_state(make_inputs(20)), impl="triton", tolerance=2e-6)


@SLOW
@settings(max_examples=2, deadline=None)
@given(cut=st.integers(1, 23), seed=st.integers(0, 99))
def test_split_anywhere_equals_whole(cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    assert_split_equals_whole(
        rule_from, without_state(make_inputs(24)), cuts=(cut,), impl="triton", tolerance=2e-6, layout=None
    )


@settings(max_examples=3, deadline=None)
@given(row=positions(40), seed=st.integers(0, 99))
def test_any_documents(row: list[int], seed: int) -> None:
    """In float64 where the interpreter computes, else of many heads."""
    torch.manual_seed(seed)
    if DEVICE == "cuda":
        assert_earned(rule, make_inputs(len(row), heads=32), impl="triton", layout=Layout(torch.tensor([row])))
        return
    inputs = {name: tensor.double() for name, tensor in make_inputs(len(row)).items()}
    assert_equals_reference(rule, inputs, row, impl="triton")


@SLOW
@settings(max_examples=2, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 99))
def test_permuting_the_batch_permutes_the_output(order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(9, batch=3)
    found = evaluate(triton_rule, {name: tensor[order] for name, tensor in inputs.items()})
    whole = evaluate(triton_rule, inputs)
    assert torch.equal(found["output"], whole["output"][order])
    assert torch.equal(found["state 0"], whole["state 0"][order])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=SLOW), torch.bfloat16])
def test_wide_and_strided_queries_and_keys(dtype: torch.dtype) -> None:
    """fp32 queries and keys beside values of `dtype`, as a mixer makes them, in any order in memory."""
    inputs = make_inputs(9, heads=2)
    inputs["v"] = inputs["v"].to(dtype)
    strided = {name: tensor.mT.contiguous().mT for name, tensor in inputs.items()}
    assert not any(strided[name].is_contiguous() for name in ("q", "k", "v", "initial_state"))
    found = evaluate(triton_rule, strided)
    assert_equal(found, evaluate(triton_rule, inputs), 0.0)
    assert_equal(found, evaluate(rule, inputs, impl="reference"), 2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("part", [0, 1])
def test_a_loss_on_one_of_the_two_results(part: int) -> None:
    """The other one's gradient is None; no initial state."""
    leaves = {name: tensor.requires_grad_() for name, tensor in without_state(make_inputs(9)).items()}
    gradients = (
        torch.autograd.grad(rule(**leaves, impl=impl)[part].square().sum(), list(leaves.values()), allow_unused=True)
        for impl in ("triton", "reference")
    )
    for found, expected in zip(*gradients):
        torch.testing.assert_close(torch.zeros_like(found) if expected is None else expected, found)


def test_too_many_key_features() -> None:
    with pytest.raises(ValueError, match="q has K = 257 features; 'triton' takes at most 256: choose 'chunked'"):
        gated_delta_rule(**without_state(make_inputs(2, keys=257)), impl="triton")
