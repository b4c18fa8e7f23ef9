"""gated_linear_attention: chunked against the time loop, the time loop against the closed form and others' code."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops import Layout, gated_linear_attention
from ops.gated_linear_attention import chunked
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

gla = partial(gated_linear_attention, output_final_state=True)


def gla_from(*, state: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    return gla(**arguments, initial_state=state)


def make_inputs(
    time: int, *, batch: int = 2, heads: int = 3, keys: int = 5, values: int = 4, dtype: torch.dtype = torch.float64
) -> Inputs:
    return {
        "q": torch.randn(batch, time, heads, keys, dtype=dtype),
        "k": torch.randn(batch, time, heads, keys, dtype=dtype),
        "v": torch.randn(batch, time, heads, values, dtype=dtype),
        "log_decay": -torch.rand(batch, time, heads, keys, dtype=dtype) * 0.3,
        "initial_state": torch.randn(batch, heads, keys, values, dtype=dtype),
    }


def without_state(inputs: Inputs) -> Inputs:
    return {name: tensor[:1] for name, tensor in inputs.items() if name != "initial_state"}


def test_reference_is_the_closed_form() -> None:
    """o_t = scale * sum over s <= t of t's document of (q_t exp(sum of log decays after s up to t)) . k_s v_s."""
    inputs = without_state(make_inputs(40))
    positions = packed_positions(40, cuts=(1, 2, 16, 33))[:1]
    o, _ = gla(**inputs, layout=Layout(positions), impl="reference", scale=0.7)
    q, k, v, log_decay = (inputs[name][0] for name in ("q", "k", "v", "log_decay"))
    for t in range(40):
        expected = torch.zeros_like(v[t])
        for s in range(t - int(positions[0, t]), t + 1):
            score = (q[t] * log_decay[s + 1 : t + 1].sum(0).exp() * k[s]).sum(-1, keepdim=True)
            expected += 0.7 * score * v[s]
        torch.testing.assert_close(o[0, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("time", QUICK_LENGTHS)
def test_chunked_equals_reference(time: int, kind: str) -> None:
    inputs, layout = make_inputs(time), layouts(time)[kind]
    expected = evaluate(gla, inputs, layout=layout, impl="reference")
    assert_equal(evaluate(gla, inputs, layout=layout, impl="chunked"), expected, 1e-13)


@pytest.mark.parametrize("tile_elements", [1, 3000])
def test_any_number_of_tiles(monkeypatch: pytest.MonkeyPatch, tile_elements: int) -> None:
    monkeypatch.setitem(chunked.TILE_ELEMENTS, "cpu", tile_elements)
    inputs = make_inputs(150)
    assert len(chunked._tiles(inputs["q"], inputs["v"])) == {1: 5, 3000: 3}[tile_elements]
    for layout in layouts(150).values():
        expected = evaluate(gla, inputs, layout=layout, impl="reference")
        assert_equal(evaluate(gla, inputs, layout=layout, impl="chunked"), expected, 1e-13)


@pytest.mark.parametrize("time", QUICK_LENGTHS)
def test_fp32_error_is_earned(time: int) -> None:
    inputs = make_inputs(time, heads=2, keys=32, values=16)
    for layout in layouts(time).values():
        assert_earned(gla, inputs, layout=layout)


@pytest.mark.parametrize("width", [16, 60, 64, 100, 128, 256])
def test_fp32_error_is_earned_at_all_widths(width: int) -> None:
    inputs = make_inputs(65, batch=1, heads=2, keys=width, values=width)
    assert_earned(gla, inputs, layout=Layout(torch.arange(9, 74)[None]))


@settings(max_examples=10, deadline=None)
@given(start=st.integers(1, 39), seed=st.integers(0, 99))
def test_documents_do_not_see_each_other(start: int, seed: int) -> None:
    """What the first document holds, and the state before it, change no bit of the second."""
    torch.manual_seed(seed)
    inputs, layout = make_inputs(40), Layout(packed_positions(40, first=1, cuts=(start,))[:1].repeat(2, 1))
    changed = {name: 2 * z if name == "initial_state" else z.clone() for name, z in inputs.items()}
    for name in ("q", "k", "v", "log_decay"):
        changed[name][:, :start] *= 0.5
    (o, state), (changed_o, changed_state) = (gla(**z, layout=layout, impl="chunked") for z in (inputs, changed))
    assert torch.equal(o[:, start:], changed_o[:, start:])
    assert torch.equal(state, changed_state)
    assert not torch.equal(o[:, :start], changed_o[:, :start])


@settings(max_examples=25, deadline=None)
@given(row=positions(150), seed=st.integers(0, 99))
def test_any_documents(row: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(len(row), batch=1, heads=1, keys=2, values=3)
    assert_equals_reference(gla, inputs, row, impl="chunked")


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
def test_extreme_decays(kind: str) -> None:
    """Decays of 1, of exp(-1e4) and of exactly 0 beside ordinary ones give no NaN and the reference's numbers."""
    inputs = make_inputs(130, keys=40, dtype=torch.float32)
    inputs["log_decay"] = extreme_decays(*inputs["log_decay"].shape)
    assert_earned(gla, inputs, layout=layouts(130)[kind])


@pytest.mark.parametrize("time", [1, 3, 11])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, time: int) -> None:
    monkeypatch.setattr(chunked, "MAX_CHUNK", 4)
    inputs = make_inputs(time, batch=1, heads=1, keys=2, values=2)
    starts = packed_positions(time, first=2, cuts=(4, 5))[:1] == 0
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *z: chunked.forward(*z, starts, 0.7)[:2], leaves)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_packed_equals_separate(impl: str) -> None:
    assert_packed_equals_separate(gla, without_state(make_inputs(260)), impl=impl, tolerance=1e-13)


def test_a_dropped_reset_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "starts", property(lambda self: torch.zeros_like(self.positions, dtype=torch.bool)))
    with pytest.raises(AssertionError):
        assert_packed_equals_separate(gla, without_state(make_inputs(260)), impl="chunked", tolerance=1e-13)


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_merge_without_its_decay_is_caught(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    level = chunked.Level
    monkeypatch.setattr(
        chunked, "Level", lambda *parts: level(*parts)._replace(**{lost: torch.ones_like(level(*parts).before)})
    )
    with pytest.raises(AssertionError):
        test_chunked_equals_reference(17, "none")


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("cuts", [(1,), (33,), (32, 64, 65, 96)])
def test_split_equals_whole(cuts: tuple[int, ...], kind: str) -> None:
    inputs = {name: tensor for name, tensor in make_inputs(129).items() if name != "initial_state"}
    assert_split_equals_whole(gla_from, inputs, cuts=cuts, impl="chunked", tolerance=1e-13, layout=layouts(129)[kind])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_bf16_is_rounded_only_at_the_end(impl: str) -> None:
    inputs = without_state(make_inputs(257))
    inputs = {name: tensor.float() if name == "log_decay" else tensor.bfloat16() for name, tensor in inputs.items()}
    results = evaluate(gla, inputs, impl=impl)
    exact = evaluate(gla, {name: tensor.double() for name, tensor in inputs.items()}, impl="reference")
    assert results["state 0"].dtype == torch.float32
    assert error(results["state 0"], exact["state 0"]) < 1e-6
    for name in ("q", "k", "v", "log_decay"):
        assert results[f"d {name}"].dtype == inputs[name].dtype
    assert results["output"].dtype == torch.bfloat16
    for name in ("output", "d q", "d k", "d v"):
        assert error(results[name], exact[name]) < 2**-8, name


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_changes_nothing(impl: str) -> None:
    inputs = make_inputs(65, dtype=torch.float32)
    expected = evaluate(gla, inputs, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(evaluate(gla, inputs, impl=impl), expected, 0.0)


def test_activation_checkpointing_changes_nothing() -> None:
    def recomputed(**arguments: Any) -> Any:
        return checkpoint(gla, **arguments, use_reentrant=False)

    inputs, options = make_inputs(70), {"layout": layouts(70)["packed"], "impl": "chunked"}
    assert_equal(evaluate(recomputed, inputs, **options), evaluate(gla, inputs, **options), 0.0)


def test_strided_inputs() -> None:
    inputs = make_inputs(65)
    strided = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in inputs.items()}
    strided["v"] = torch.cat([inputs["v"]] * 2, dim=3)[..., :4]
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_equal(evaluate(gla, strided, impl="chunked"), evaluate(gla, inputs, impl="chunked"), 0.0)


def test_inputs_stay_as_they_were() -> None:
    inputs = make_inputs(70)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    evaluate(gla, inputs, layout=Layout(packed_positions(70)), impl="chunked")
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


def test_no_final_state_unless_asked() -> None:
    inputs = make_inputs(3)
    assert gated_linear_attention(**inputs)[1] is None


@pytest.mark.filterwarnings("ignore:Triton is not supported")
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_the_naive_op_of_flash_linear_attention(impl: str) -> None:
    """Outputs, last state and every gradient; that op runs in fp32 and scales by K**-0.5."""
    from fla.ops.gla.naive import naive_recurrent_gla

    def theirs(*, log_decay: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        return naive_recurrent_gla(**arguments, gk=log_decay, output_final_state=True)

    inputs = make_inputs(100, keys=16, values=24, dtype=torch.float32)
    assert_equal(evaluate(gla, inputs, impl=impl), evaluate(theirs, inputs), 1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 3, 5)}, r"q has shape \[2, 3, 5\]; must be \[B, T, H, K\]"),
        ({"v": torch.zeros(2, 3, 3, 0)}, "each size >= 1"),
        ({"v": torch.zeros(2, 3, 2, 4)}, r"v has shape \[2, 3, 2, 4\].*\[2, 3, 3, 4\]"),
        ({"k": torch.zeros(2, 3, 3, 4)}, r"k has shape \[2, 3, 3, 4\].*\[2, 3, 3, 5\]"),
        ({"log_decay": torch.zeros(2, 3, 3)}, r"log_decay has shape \[2, 3, 3\].*\[2, 3, 3, 5\]"),
        ({"initial_state": torch.zeros(2, 3, 4, 5)}, "initial_state"),
        ({"log_decay": torch.zeros(2, 3, 3, 5, dtype=torch.int64)}, "log_decay has dtype torch.int64"),
        ({"layout": Layout(torch.arange(4).repeat(2, 1))}, "layout.positions"),
        ({"impl": "tritn"}, "has no implementation 'tritn'; choose one of auto, chunked, "),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3, dtype=torch.float32) | wrong
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**arguments)
