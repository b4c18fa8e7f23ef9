"""gated_linear_attention's Triton kernels, interpreted where there is no GPU, and both tiers as registered ops."""

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
from ops.gated_linear_attention import triton as kernels
from tests.ops import test_gated_linear_attention
from tests.ops.compare import (
    DEVICE,
    LENGTHS,
    SLOW,
    assert_earned,
    assert_earned_bf16,
    assert_equal,
    error,
    evaluate,
    extreme_decays,
    packed_positions,
)
from tests.ops.documents import assert_equals_reference, positions
from tests.ops.test_gated_linear_attention import gla

make_inputs = partial(
    test_gated_linear_attention.make_inputs, batch=1, heads=1, keys=16, values=16, dtype=torch.float32
)
earned = partial(assert_earned, gla, impl="triton")
# The interpreter also computes in float64; compiled kernels refuse it.
PRECISE, ROUNDING = (torch.float64, 1e-13) if DEVICE == "cpu" else (torch.float32, 1e-6)
QUICK = [(1, 16, 16, "none"), (17, 20, 16, "packed"), (64, 16, 36, "packed"), (100, 16, 16, "continued")]
DIMS = (16, 60, 64, 100, 128, 256)
KINDS = list(enumerate(("none", "packed", "continued")))
GRID = [(t, DIMS[i % 6], DIMS[(i // 2 + j) % 6], kind) for i, t in enumerate(LENGTHS) for j, kind in KINDS]
if DEVICE == "cpu":  # a minute each
    GRID = [case for case in GRID if case[0] <= 100 or case[3] == "packed"]
# Of a few numbers, one rounding decides whose error is larger.
HEADS_OF_SHORT = 4
HEADS_OF_FEW = 32
CASES = [pytest.param(*case, marks=SLOW) for case in GRID]
ON_DEMAND = [pytest.param(*case, marks=SLOW) for case in (QUICK[0], QUICK[2])]
TRITON_SLOW = ["chunked", pytest.param("triton", marks=SLOW)]


def make_layout(time: int, kind: str) -> Layout | None:
    """One row of documents of many lengths, or one that continues."""
    rows = packed_positions(time)[:1] if kind == "packed" else packed_positions(time, first=7)[1:]
    return None if kind == "none" else Layout(rows)


@pytest.mark.parametrize(("time", "keys", "values", "kind"), [QUICK[1], QUICK[3], *ON_DEMAND, *CASES])
def test_fp32_error_is_earned(time: int, keys: int, values: int, kind: str) -> None:
    heads = HEADS_OF_SHORT if time <= 17 else 1
    earned(make_inputs(time, heads=heads, keys=keys, values=values), layout=make_layout(time, kind))


@pytest.mark.parametrize(("time", "keys", "values", "kind"), [QUICK[2], pytest.param(*QUICK[1], marks=SLOW), *CASES])
def test_bf16_error_is_earned(time: int, keys: int, values: int, kind: str) -> None:
    heads = HEADS_OF_SHORT if time <= 17 else 1
    inputs = make_inputs(time, heads=heads, keys=keys, values=values)
    assert_earned_bf16(gla, inputs, layout=make_layout(time, kind))


@pytest.mark.parametrize(
    ("batch", "heads", "time", "keys", "values"),
    [(2, 2, 5, 16, 16), *(pytest.param(*case, marks=SLOW) for case in ((2, 3, 5, 16, 16), (3, 5, 257, 128, 128)))],
)
def test_batch_and_heads(batch: int, heads: int, time: int, keys: int, values: int) -> None:
    earned(make_inputs(time, batch=batch, heads=heads, keys=keys, values=values))


def test_more_channels_than_a_block() -> None:
    earned(make_inputs(3, keys=100, values=150), layout=make_layout(3, "packed"))


@pytest.mark.parametrize("kind", ["packed", pytest.param("none", marks=SLOW)])
def test_extreme_decays(kind: str) -> None:
    """Gates of 1 (log decay 0), of exp(-1e4) and of exactly 0 beside ordinary and strong ones, alone and mixed."""
    inputs = make_inputs(70, keys=24)
    inputs["log_decay"] = extreme_decays(*inputs["log_decay"].shape)
    earned(inputs, layout=make_layout(70, kind))


def test_gate_of_one() -> None:
    """Nothing is forgotten, and all decays have a gradient."""
    inputs = make_inputs(66)
    inputs["log_decay"].zero_()
    earned(inputs)


@pytest.mark.filterwarnings("ignore:.*encountered")
def test_padding_rows_never_reach_exp() -> None:
    """A row's last chunk is filled up beyond its end, where the next row lies."""
    inputs = make_inputs(3, batch=2)
    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    for tensor in poisoned.values():
        tensor[1] = torch.nan
    poisoned["log_decay"][1] = 1e4
    expected = evaluate(gla, inputs, impl="triton")
    found = evaluate(gla, poisoned, impl="triton")
    for name, tensor in found.items():
        assert torch.equal(tensor[0], expected[name][0]), name


def test_strided_inputs() -> None:
    inputs = make_inputs(5, heads=2)
    strided = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in inputs.items()}
    strided["v"] = torch.cat([inputs["v"]] * 2, dim=3)[..., :16]
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_equal(evaluate(gla, strided, impl="triton"), evaluate(gla, inputs, impl="triton"), 0.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels refuse float64")
@SLOW
@pytest.mark.parametrize("time", [7, 67])
def test_gradcheck(time: int) -> None:
    inputs = make_inputs(time, keys=2, values=2, dtype=torch.float64)
    starts = torch.zeros(1, time, dtype=torch.bool)
    starts[0, [5, time - 2]] = True
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *z: kernels.forward(*z, starts, 0.7)[:2], leaves, fast_mode=True)


@settings(max_examples=4, deadline=None)
@given(row=positions(80), seed=st.integers(0, 99))
def test_any_documents(row: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(len(row), heads=1 if DEVICE == "cpu" else HEADS_OF_FEW, dtype=PRECISE)
    if DEVICE == "cpu":
        assert_equals_reference(gla, inputs, row, impl="triton")
    else:
        earned(inputs, layout=Layout(torch.tensor([row])))


def cut_in_two(*, cut: int, layout: Layout | None, initial_state: Tensor, impl: str, **tensors: Tensor) -> Any:
    """gla of the tokens before `cut`, then of the others from the state of the first."""
    outputs, state = [], initial_state
    for part in (slice(0, cut), slice(cut, None)):
        here = None if layout is None else Layout(layout.positions[:, part])
        pieces = {name: tensor[:, part] for name, tensor in tensors.items()}
        o, state = gla(**pieces, layout=here, initial_state=state, impl=impl)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("impl", TRITON_SLOW)
@settings(max_examples=2, deadline=None)
@given(cut=st.integers(1, 69), kind=st.sampled_from(["none", "packed", "continued"]), seed=st.integers(0, 99))
def test_split_anywhere_equals_whole(impl: str, cut: int, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs, layout = make_inputs(70, dtype=PRECISE), make_layout(70, kind)
    whole = evaluate(gla, inputs, layout=layout, impl=impl)
    assert_equal(evaluate(partial(cut_in_two, cut=cut), inputs, layout=layout, impl=impl), whole, ROUNDING)


@pytest.mark.parametrize("impl", TRITON_SLOW)
@settings(max_examples=3, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 99))
def test_permuting_the_batch_permutes_the_output(impl: str, order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(20, batch=3, dtype=PRECISE).items()}
    permuted = {name: tensor[order] for name, tensor in inputs.items()}
    for actual, expected in zip(gla(**permuted, impl=impl), gla(**inputs, impl=impl)):
        assert error(actual, expected[order]) <= ROUNDING


def lose_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernels._run_chunks
    monkeypatch.setattr(kernels, "_run_chunks", lambda *z: run(*z[:4], None, *z[5:]))


def lose_states(monkeypatch: pytest.MonkeyPatch, direction: bool) -> None:
    run = kernels._run_carry

    def carry(*args: Any, reverse: bool) -> tuple[Tensor, Tensor]:
        states, last = run(*args, reverse=reverse)
        return states.zero_() if reverse == direction else states, last

    monkeypatch.setattr(kernels, "_run_carry", carry)


@pytest.mark.parametrize("lost", ["document starts", "carried states", "their gradients"])
def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    inputs, layout = make_inputs(70), Layout(torch.cat([torch.arange(9), torch.arange(61)])[None])
    if lost == "document starts":
        lose_starts(monkeypatch)
    else:
        lose_states(monkeypatch, direction=lost == "their gradients")
    with pytest.raises(AssertionError, match="earned"):
        earned(inputs, layout=layout)


@pytest.mark.skipif(DEVICE == "cpu", reason="interpreting half a million programs takes hours")
def test_more_programs_than_65535() -> None:
    inputs = make_inputs(2, batch=70_000)
    assert_equal(evaluate(gla, inputs, impl="triton"), evaluate(gla, inputs, impl="chunked"), 1e-6)


def test_refuses_float16() -> None:
    inputs = {name: tensor.half().to(DEVICE) for name, tensor in make_inputs(2).items()}
    with pytest.raises(
        ValueError, match=r"q has dtype torch\.float16; must be bfloat16 or float32 .* choose 'chunked'"
    ):
        gated_linear_attention(**inputs, impl="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter computes in float64")
def test_refuses_float64_on_a_gpu() -> None:
    inputs = {name: tensor.double().to(DEVICE) for name, tensor in make_inputs(2).items()}
    with pytest.raises(ValueError, match=r"torch\.float64.*choose 'chunked'"):
        gated_linear_attention(**inputs, impl="triton")


@pytest.mark.parametrize(("module", "packed"), [(chunked, False), pytest.param(kernels, True, marks=SLOW)])
def test_registered_ops(module: Any, packed: bool) -> None:
    inputs = [tensor.to(DEVICE) for tensor in make_inputs(3, values=20).values()]
    starts = torch.tensor([[False, True, True]], device=DEVICE) if packed else None
    torch.library.opcheck(module.forward, (*(z.clone().requires_grad_() for z in inputs), starts, 0.5))
    o, state, kept = module.forward(*inputs, starts, 0.5)
    saved = (inputs[-1], kept) if module is kernels else (kept,)
    torch.library.opcheck(module.backward, (o, state, *inputs[:4], *saved, starts, 0.5))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_compiles_in_one_graph(impl: str) -> None:
    inputs, layout = make_inputs(5), make_layout(5, "packed")
    compiled = torch.compile(gla, fullgraph=True, backend="aot_eager")
    expected = evaluate(gla, inputs, layout=layout, impl=impl)
    assert_equal(evaluate(compiled, inputs, layout=layout, impl=impl), expected, 0.0)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_only_some_gradients(impl: str) -> None:
    """A loss on the state alone, and one on the output alone."""
    for kept in (0, 1):
        leaves = {name: z.to(DEVICE).requires_grad_() for name, z in make_inputs(4).items()}
        loss, exact_loss = (gla(**leaves, impl=name)[kept].square().sum() for name in (impl, "reference"))
        found = torch.autograd.grad(loss, leaves.values())
        expected = torch.autograd.grad(exact_loss, leaves.values(), materialize_grads=True)
        for actual, exact in zip(found, expected):
            assert error(actual, exact) <= 1e-6


def test_activation_checkpointing_and_autocast_change_nothing() -> None:
    def recomputed(**arguments: Any) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            return checkpoint(gla, **arguments, use_reentrant=False)

    inputs, options = make_inputs(5), {"layout": make_layout(5, "packed"), "impl": "triton"}
    assert_equal(evaluate(recomputed, inputs, **options), evaluate(gla, inputs, **options), 0.0)


def test_fp32_keys_enter_products_as_narrow_as_values() -> None:
    """As HGRN2 hands them over under autocast: of the same numbers, the same output to the bit."""
    inputs = {name: z.bfloat16() if name in "qkv" else z for name, z in make_inputs(20).items()}
    narrow = evaluate(gla, inputs, impl="triton")
    wide = evaluate(gla, inputs | {"k": inputs["k"].float()}, impl="triton")
    assert wide["d k"].dtype == torch.float32
    assert narrow["d k"].dtype == torch.bfloat16
    assert all(torch.equal(wide[name], narrow[name]) for name in ("output", "state 0", "d q", "d v"))
    assert error(wide["d k"], narrow["d k"]) < 4e-3
