"""gated_delta_rule: chunked against the time loop, the time loop against the equation and another project's."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ops import Layout, gated_delta_rule
from ops.gated_delta_rule import chunked, decays
from ops.gated_delta_rule.decays import chunk_masks
from tests.ops.compare import (
    QUICK_LENGTHS,
    Inputs,
    assert_earned,
    assert_equal,
    assert_packed_equals_separate,
    assert_split_equals_whole,
    error,
    evaluate,
    extreme_decays,
    layouts,
    packed_positions,
)
from tests.ops.documents import assert_equals_reference, positions

rule = partial(gated_delta_rule, output_final_state=True)

# Where beta is near 2 and the keys of a chunk nearly parallel, the entries of (I + L)^-1 are near 2 with alternating
# signs, and cancel in every sum over the chunk. The time loop, which never forms them, stays at 1e-6 here; inverting by
# blocks errs 1e-5 (6e-5 for keys that are equal), multiplying powers of L 3e21.
PARALLEL_KEYS_TOLERANCE = 2e-5


def rule_from(*, state: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    return rule(**arguments, initial_state=state)


def make_inputs(
    time: int, *, batch: int = 2, heads: int = 1, group: int = 2, dtype: torch.dtype = torch.float64, width: int = 5
) -> Inputs:
    """Keys of norm 1 and beta between 0 and 2."""
    value_heads = heads * group
    return {
        "q": torch.randn(batch, time, heads, width, dtype=dtype),
        "k": normalize(torch.randn(batch, time, heads, width, dtype=dtype), dim=-1),
        "v": torch.randn(batch, time, value_heads, width + 2, dtype=dtype),
        "log_decay": -torch.rand(batch, time, value_heads, dtype=dtype) * 0.3,
        "beta": 2 * torch.rand(batch, time, value_heads, dtype=dtype),
        "initial_state": torch.randn(batch, value_heads, width, width + 2, dtype=dtype),
    }


def without_state(inputs: Inputs) -> Inputs:
    return {name: tensor[:1] for name, tensor in inputs.items() if name != "initial_state"}


def test_reference_is_the_equation() -> None:
    """S_t as a product of matrices, each value head with its own group's keys, reset where a document starts."""
    inputs = make_inputs(12, heads=2)
    positions = packed_positions(12, first=3, cuts=(1, 2, 9))
    o, state = rule(**inputs, layout=Layout(positions), impl="reference", scale=0.7)
    for b in range(2):
        for head in range(4):
            q, k = inputs["q"][b, :, head // 2], inputs["k"][b, :, head // 2]
            s = inputs["initial_state"][b, head]
            for t in range(12):
                if positions[b, t] == 0:
                    s = torch.zeros_like(s)
                decay, beta = inputs["log_decay"][b, t, head].exp(), inputs["beta"][b, t, head]
                forget = torch.eye(5, dtype=s.dtype) - beta * torch.outer(k[t], k[t])
                s = decay * forget @ s + beta * torch.outer(k[t], inputs["v"][b, t, head])
                torch.testing.assert_close(o[b, t, head], 0.7 * s.T @ q[t], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(state[b, head], s, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_another_projects_loop(impl: str) -> None:
    """flash-linear-attention's naive recurrence: outputs, final state and every gradient."""
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    inputs = make_inputs(70, heads=3, group=1, dtype=torch.float32, width=16)

    def oracle(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial_state: Tensor) -> Any:
        return naive(q, k, v, beta, log_decay, initial_state=initial_state, output_final_state=True)

    assert_equal(evaluate(rule, inputs, impl=impl), evaluate(oracle, inputs), 5e-6)


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("time", QUICK_LENGTHS)
def test_chunked_equals_reference(time: int, kind: str) -> None:
    inputs, layout = make_inputs(time), layouts(time)[kind]
    expected = evaluate(rule, inputs, layout=layout, impl="reference")
    assert_equal(evaluate(rule, inputs, layout=layout, impl="chunked"), expected, 1e-12)


@pytest.mark.parametrize("time", QUICK_LENGTHS)
def test_fp32_error_is_earned(time: int) -> None:
    """With enough heads at short lengths that the time loop is not right by luck."""
    inputs = make_inputs(time, group=max(1, 1024 // time), width=16)
    for kind, layout in layouts(time).items():
        if time < 1025 or kind == "packed":
            assert_earned(rule, inputs, layout=layout)


@pytest.mark.parametrize("width", [60, 64, 100, 128, 256])
def test_fp32_error_is_earned_at_all_widths(width: int) -> None:
    """Sums over more than 64 features in one chain err up to 2.2 times as much as the time loop's."""
    assert_earned(
        rule, make_inputs(65, batch=1, heads=2, group=2, width=width), layout=Layout(torch.arange(9, 74)[None])
    )


@settings(max_examples=25, deadline=None)
@given(row=positions(150), seed=st.integers(0, 99))
def test_any_documents(row: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(len(row), batch=1, group=1, width=2)
    assert_equals_reference(rule, inputs, row, impl="chunked")


def extreme_inputs(time: int) -> Inputs:
    inputs = make_inputs(time, heads=8, group=2, width=16, dtype=torch.float32)
    inputs["log_decay"] = extreme_decays(*inputs["log_decay"].shape)
    inputs["beta"] = torch.tensor([0.0, 1.0, 2.0])[torch.randint(0, 3, inputs["beta"].shape)]
    return inputs


@pytest.mark.parametrize("kind", ["none", "continued", "packed"])
def test_extreme_decays_and_strengths(kind: str) -> None:
    """Decays of 1, exp(-1e4) and exactly 0 beside ordinary ones; tokens that write nothing, replace or reflect."""
    inputs, layout = extreme_inputs(130), layouts(130)[kind]
    assert_earned(rule, inputs, layout=layout)


def test_no_decay_at_all() -> None:
    """DeltaNet: log decays of 0 over many chunks."""
    inputs = make_inputs(300, width=16, group=1)
    inputs["log_decay"] = torch.zeros_like(inputs["log_decay"])
    assert_equal(evaluate(rule, inputs, impl="chunked"), evaluate(rule, inputs, impl="reference"), 1e-12)


def parallel_keys(time: int = 257) -> Inputs:
    inputs = make_inputs(time, group=1, width=16, dtype=torch.float32)
    noise = 0.1 * torch.randn_like(inputs["k"])
    inputs["k"] = normalize(torch.ones_like(noise) + noise, dim=-1)
    return inputs | {"beta": torch.full_like(inputs["beta"], 1.999), "log_decay": inputs["log_decay"] * 0.01}


def test_strength_near_two_with_parallel_keys() -> None:
    inputs = parallel_keys()
    exact = evaluate(rule, {name: tensor.double() for name, tensor in inputs.items()}, impl="reference")
    assert_equal(evaluate(rule, inputs, impl="chunked"), exact, PARALLEL_KEYS_TOLERANCE)


def test_the_product_of_powers_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubling(lower: Tensor) -> Tensor:
        power = -lower.tril(-1)
        inverse = torch.eye(lower.shape[-1], dtype=lower.dtype) + power
        for _ in range(5):
            power = power @ power
            inverse = inverse + inverse @ power
        return inverse

    exact = evaluate(rule, make_inputs(65), impl="reference")
    monkeypatch.setattr(chunked, "unit_lower_inverse", doubling)
    torch.manual_seed(0)
    assert_equal(evaluate(rule, make_inputs(65), impl="chunked"), exact, 1e-3)
    with pytest.raises(AssertionError):
        test_strength_near_two_with_parallel_keys()


@pytest.mark.parametrize("time", [1, 3, 11])
def test_gradcheck(time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_CHUNK", 4)
    leaves = {name: tensor.requires_grad_() for name, tensor in make_inputs(time, batch=1, width=2).items()}
    layout = Layout(packed_positions(time, first=2, cuts=(5, 6))[:1])

    def call(*tensors: Tensor) -> Any:
        return rule(**dict(zip(leaves, tensors)), layout=layout, impl="chunked")

    assert torch.autograd.gradcheck(call, list(leaves.values()))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_packed_equals_separate(impl: str) -> None:
    assert_packed_equals_separate(rule, without_state(make_inputs(260)), impl=impl, tolerance=1e-12)


@pytest.fixture(params=["pair", "carry_in", "carry_out", "through"])
def without_one_mask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    def masks(positions: Tensor, size: int, dtype: torch.dtype) -> Any:
        right = chunk_masks(positions, size, dtype)
        return right._replace(**{request.param: torch.ones_like(getattr(right, request.param))})

    monkeypatch.setattr(decays, "chunk_masks", masks)
    return request.param


def test_each_dropped_reset_is_caught(without_one_mask: str) -> None:
    with pytest.raises(AssertionError):
        assert_packed_equals_separate(rule, without_state(make_inputs(260)), impl="chunked", tolerance=1e-12)


def test_a_forgotten_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the log decays without the ways inside a chunk."""
    honest = chunked.log_decay_gradient
    monkeypatch.setattr(chunked, "log_decay_gradient", lambda pair, *rest: honest(pair * 0, *rest))
    inputs = make_inputs(65)
    with pytest.raises(AssertionError, match="d log_decay"):
        assert_equal(evaluate(rule, inputs, impl="chunked"), evaluate(rule, inputs, impl="reference"), 1e-12)


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("cuts", [(1,), (33,), (32, 64, 65, 96)])
def test_split_equals_whole(cuts: tuple[int, ...], kind: str) -> None:
    inputs = {name: tensor for name, tensor in make_inputs(129).items() if name != "initial_state"}
    assert_split_equals_whole(rule_from, inputs, cuts=cuts, impl="chunked", tolerance=1e-12, layout=layouts(129)[kind])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_bf16_is_rounded_only_at_the_end(impl: str) -> None:
    inputs = without_state(make_inputs(257, width=16))
    narrow = {name: tensor.bfloat16() if name in "qkv" else tensor.float() for name, tensor in inputs.items()}
    narrow["beta"] = narrow["beta"] * 0.9  # rounded keys may be longer than 1
    o, state = rule(**narrow, impl=impl)
    exact, exact_state = rule(**{name: tensor.double() for name, tensor in narrow.items()}, impl="reference")
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert error(state, exact_state) < 1e-6
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_changes_nothing(impl: str) -> None:
    inputs = make_inputs(65, dtype=torch.float32)
    expected = evaluate(rule, inputs, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(evaluate(rule, inputs, impl=impl), expected, 0.0)


def test_strided_inputs() -> None:
    inputs = make_inputs(65, heads=2)
    strided = {name: tensor.mT.contiguous().mT for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_equal(evaluate(rule, strided, impl="chunked"), evaluate(rule, inputs, impl="chunked"), 0.0)


def test_shapes_without_data() -> None:
    """On the meta device, where models are built to be counted."""
    inputs = {name: tensor.to("meta").requires_grad_() for name, tensor in make_inputs(65).items()}
    o, state = rule(**inputs)
    (o.sum() + state.sum()).backward()
    assert o.shape == inputs["v"].shape
    assert all(tensor.grad is not None for tensor in inputs.values())


def test_scale() -> None:
    inputs = make_inputs(9)
    o, state = rule(**inputs)
    scaled, same_state = rule(**inputs, scale=3.0)
    torch.testing.assert_close(scaled, o * 3.0 * 5**0.5)
    assert torch.equal(state, same_state)


def test_no_final_state_unless_asked() -> None:
    assert gated_delta_rule(**make_inputs(3))[1] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 3, 5)}, r"q has shape \[2, 3, 5\]; must be \[B, T, H, K\]"),
        ({"k": torch.zeros(2, 3, 1, 4)}, r"k has shape \[2, 3, 1, 4\].*\[2, 3, 1, 5\]"),
        ({"v": torch.zeros(2, 4, 2, 7)}, r"v has shape \[2, 4, 2, 7\].*\[2, 3, 2, 7\]"),
        ({"q": torch.zeros(2, 3, 3, 5), "k": torch.zeros(2, 3, 3, 5)}, "HV = 2 heads; must be a multiple of k's H = 3"),
        ({"log_decay": torch.zeros(2, 3, 2, 5)}, r"log_decay has shape \[2, 3, 2, 5\].*\[2, 3, 2\]"),
        ({"beta": torch.zeros(2, 3, 1)}, "beta has shape"),
        ({"beta": torch.zeros(2, 3, 2, dtype=torch.int64)}, "beta has dtype torch.int64"),
        ({"initial_state": torch.zeros(2, 2, 7, 5)}, r"initial_state has shape.*\[B, HV, K, V\] = \[2, 2, 5, 7\]"),
        ({"layout": Layout(torch.arange(4).repeat(2, 1))}, "layout.positions"),
        ({"impl": "tritn"}, "choose one of auto, chunked, reference, triton, fla"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3, dtype=torch.float32) | wrong
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**arguments)
