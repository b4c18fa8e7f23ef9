"""attention and local_attention: the fused forms against the definition, the definition against a loop."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ops import Layout, attention, local_attention
from ops.attention import chunked, sdpa
from tests.ops.compare import (
    QUICK_LENGTHS,
    Inputs,
    assert_earned,
    assert_equal,
    assert_packed_equals_separate,
    assert_split_equals_whole,
    evaluate,
    layouts,
    packed_positions,
)
from tests.ops.largest import LargestTensor

FORMS = ("chunked", "sdpa")
IMPLS = ("reference", *FORMS)


def attend(
    q: Tensor, k: Tensor, v: Tensor, state_k: Tensor | None = None, state_v: Tensor | None = None, **options: Any
) -> tuple[Tensor, Any]:
    """attention, or local_attention if `window` is given, with the two tensors of the state as arguments."""
    state = None if state_k is None or state_v is None else (state_k, state_v)
    op: Callable[..., Any] = local_attention if "window" in options else attention
    return op(q, k, v, initial_state=state, output_final_state=True, **options)


def attend_from(*, state: tuple[Tensor, Tensor] | None, **arguments: Any) -> tuple[Tensor, Any]:
    return attend(**arguments) if state is None else attend(**arguments, state_k=state[0], state_v=state[1])


def make_inputs(
    time: int,
    *,
    previous: int | None = None,
    heads: int = 4,
    groups: int = 2,
    width: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    sizes = {"q": (time, heads), "k": (time, groups), "v": (time, groups)}
    if previous is not None:
        sizes |= {"state_k": (previous, groups), "state_v": (previous, groups)}
    return {name: torch.randn(2, *size, width, dtype=dtype) for name, size in sizes.items()}


def one_row(inputs: Inputs) -> Inputs:
    return {name: tensor[:1] for name, tensor in inputs.items()}


@pytest.mark.parametrize(("device", "groups_of_call"), [("cuda", 4), ("cpu", 2)])
@pytest.mark.parametrize("masked", [True, False])
def test_cuda_kernels_get_a_key_for_every_head(device: str, groups_of_call: int, masked: bool) -> None:
    """Tensors without data stand for those of a GPU: what matters is what is asked of torch."""
    with FakeTensorMode(), mock.patch.object(sdpa, "scaled_dot_product_attention") as kernel:
        kernel.side_effect = lambda q, k, v, **options: q
        q, k, v = (torch.empty(2, 9, n, 8, device=device) for n in (4, 2, 2))
        mask = torch.empty(2, 1, 9, 9, dtype=torch.bool, device=device) if masked else None
        o = sdpa.sdpa(q, k, v, 1.0, mask)
    assert o.shape == q.shape
    call = kernel.call_args
    assert [z.shape[1] for z in call.args] == [4, groups_of_call, groups_of_call]
    assert call.kwargs["enable_gqa"] == (groups_of_call < 4)
    assert call.kwargs["is_causal"] == (not masked)


def test_a_key_for_every_head_changes_no_result() -> None:
    inputs = make_inputs(9)
    expanded = inputs | {name: inputs[name].repeat_interleave(2, dim=2) for name in ("k", "v")}
    for impl in FORMS:
        torch.testing.assert_close(attend(**expanded, impl=impl)[0], attend(**inputs, impl=impl)[0])


@pytest.mark.parametrize("window", [None, 3])
def test_reference_is_the_definition(window: int | None) -> None:
    inputs = make_inputs(9, previous=2)
    positions = packed_positions(9, first=5, cuts=(3, 4))
    options: dict[str, Any] = {} if window is None else {"window": window}
    o, _ = attend(**inputs, layout=Layout(positions), scale=0.3, impl="reference", **options)
    keys, values = (torch.cat([inputs[f"state_{z}"], inputs[z]], dim=1) for z in ("k", "v"))
    for b in range(2):
        for t in range(9):
            seen = (
                min(2 + t, int(positions[b, t]), 99 if window is None else window - 1) + 1
            )  # tokens, its own included
            for h in range(4):
                k, v = (z[b, 2 + t - seen + 1 : 2 + t + 1, h // 2] for z in (keys, values))
                expected = (0.3 * k @ inputs["q"][b, t, h]).softmax(0) @ v
                torch.testing.assert_close(o[b, t, h], expected)


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize(("time", "previous"), [(1, 0), (1, 9), (2, None), (17, 3), (65, None), (130, 7)])
def test_attention_equals_reference(time: int, previous: int | None, heads: int, groups: int, kind: str) -> None:
    inputs, layout = make_inputs(time, previous=previous, heads=heads, groups=groups), layouts(time)[kind]
    expected = evaluate(attend, inputs, layout=layout, impl="reference")
    for impl in FORMS:
        assert_equal(evaluate(attend, inputs, layout=layout, impl=impl), expected, 1e-13)


# Windows below and above a block of 64; sequences below, at and above two blocks; states below and above a window.
@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize(
    ("time", "window", "previous"),
    [
        *[(1, 4, 3), (1, 1, 0), (2, 2, None), (65, 16, 15), (128, 64, None), (129, 64, 63), (129, 1, None)],
        *[(150, 7, 2), (193, 64, 90), (200, 65, None), (257, 96, 40), (300, 128, 127), (100, 1000, 20)],
    ],
)
def test_local_attention_equals_reference(time: int, window: int, previous: int | None, kind: str) -> None:
    inputs, layout = make_inputs(time, previous=previous), layouts(time)[kind]
    expected = evaluate(attend, inputs, layout=layout, impl="reference", window=window)
    for impl in FORMS:
        assert_equal(evaluate(attend, inputs, layout=layout, impl=impl, window=window), expected, 1e-12)
    state = local_attention(**make_inputs(time), window=window, output_final_state=True)[1]
    assert state is not None
    assert state[0].shape[1] == state[1].shape[1] == min(time, window - 1)


@settings(max_examples=15, deadline=None)
@given(
    time=st.integers(1, 260),
    window=st.integers(1, 100),
    previous=st.integers(0, 110),
    cuts=st.lists(st.integers(1, 259), max_size=4).map(sorted),
)
def test_any_window(time: int, window: int, previous: int, cuts: list[int]) -> None:
    inputs = make_inputs(time, previous=previous, heads=2, groups=1)
    layout = Layout(packed_positions(time, first=previous, cuts=cuts))
    expected = evaluate(attend, inputs, layout=layout, impl="reference", window=window)
    for impl in FORMS:
        assert_equal(evaluate(attend, inputs, layout=layout, impl=impl, window=window), expected, 1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 40}])
@pytest.mark.parametrize("time", QUICK_LENGTHS)
def test_fp32_error_is_earned(time: int, options: dict[str, int]) -> None:
    for kind, layout in layouts(time).items():
        if time < 1025 or kind == "packed":
            assert_earned(attend, make_inputs(time, heads=2, groups=1), layout=layout, **options)


@pytest.mark.parametrize("width", [16, 60, 64, 100, 128, 256])
def test_fp32_error_is_earned_at_all_widths(width: int) -> None:
    inputs = make_inputs(129, previous=5, heads=2, groups=1, width=width)
    assert_earned(attend, inputs, layout=layouts(129)["continued"])


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"window": 70}])
@pytest.mark.parametrize("impl", IMPLS)
def test_packed_equals_separate(impl: str, options: dict[str, int]) -> None:
    inputs = one_row(make_inputs(260))
    assert_packed_equals_separate(partial(attend, **options), inputs, impl=impl, tolerance=1e-12)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("options", [{}, {"window": 20}])
def test_dropped_document_mask_is_caught(monkeypatch: pytest.MonkeyPatch, options: dict[str, int], impl: str) -> None:
    def whole_rows(self: Layout, function: Callable[..., Any], *args: Any) -> Any:
        return function(torch.arange(self.positions.shape[1]).expand_as(self.positions), *args)

    monkeypatch.setattr(Layout, "derive", whole_rows)
    inputs = one_row(make_inputs(260))
    with pytest.raises(AssertionError):
        assert_packed_equals_separate(partial(attend, **options), inputs, impl=impl, tolerance=1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 64}])
@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_split_equals_whole(impl: str, kind: str, options: dict[str, int]) -> None:
    op = partial(attend_from, **options)
    cuts = (1, 2, 17, 33, 165)
    layout = layouts(170)[kind]
    assert_split_equals_whole(op, make_inputs(170), cuts=cuts, impl=impl, tolerance=1e-12, layout=layout)


@pytest.mark.parametrize(("module", "name"), [(chunked, "oldest_keys"), (sdpa, "visible_keys")])
def test_the_mask_is_built_once_per_layout(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    build = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or build(*args))
    layout = Layout(packed_positions(20))
    for _ in range(3):
        attention(**make_inputs(20), layout=layout, impl=module.__name__.split(".")[-1])
    assert len(calls) == 1


@pytest.mark.parametrize("impl", FORMS)
def test_local_attention_does_not_work_on_all_pairs(impl: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(2048, heads=2, groups=1).items()}
    with LargestTensor() as largest:
        o, _ = local_attention(**inputs, window=32, layout=Layout(packed_positions(2048)), impl=impl)
        o.sum().backward()
    assert largest.numel <= 2 * 2048 * 128  # two rows of pairs with 128 keys each
    assert largest.numel < 2048 * 2048


@pytest.mark.parametrize("impl", FORMS)
def test_memory_of_local_attention_is_linear_in_time(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "TILE", 1)
    monkeypatch.setattr(chunked, "block_size", lambda time: 64)
    sizes = []
    for time in (512, 1024, 2048):
        inputs = {name: z.requires_grad_() for name, z in make_inputs(time, heads=2, groups=1).items()}
        with LargestTensor() as largest:
            local_attention(**inputs, window=100, layout=Layout(packed_positions(time)), impl=impl)[0].sum().backward()
        sizes.append(largest.numel)
    assert sizes[1] / sizes[0] <= 2.2
    assert sizes[2] / sizes[1] <= 2.2


@pytest.mark.parametrize("options", [{}, {"window": 5}])
def test_compiles_whole_and_recomputes(options: dict[str, int]) -> None:
    """torch.compile without a break in the graph, and activation checkpointing, change no result."""
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(150, previous=3).items()}
    positions = packed_positions(150, first=2)

    def loss(layout: Layout, inputs: Inputs) -> Tensor:
        return attend(**inputs, layout=layout, **options)[0].square().sum()

    expected = loss(Layout(positions), inputs)
    gradients = torch.autograd.grad(expected, list(inputs.values()))
    for form in (
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
        partial(checkpoint, loss, use_reentrant=False),
    ):
        found = form(Layout(positions), inputs)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, list(inputs.values())), gradients):
            torch.testing.assert_close(a, b)


def test_bf16_keeps_its_dtype() -> None:
    inputs = make_inputs(65, previous=3, dtype=torch.bfloat16)
    exact, _ = attend(**{name: tensor.double() for name, tensor in inputs.items()}, impl="reference")
    for impl in IMPLS:
        o, state = attend(**inputs, impl=impl)
        assert o.dtype == state[0].dtype == state[1].dtype == torch.bfloat16
        torch.testing.assert_close(o.double(), exact, rtol=2**-6, atol=2**-7)


def test_autocast_keeps_the_dtype() -> None:
    inputs = make_inputs(65, dtype=torch.float32)
    exact, _ = attend(**inputs)
    for impl in IMPLS:
        with torch.autocast("cpu", torch.bfloat16):
            o, state = attend(**inputs, impl=impl)
        assert o.dtype == state[0].dtype == torch.float32
        torch.testing.assert_close(o, exact, rtol=2**-6, atol=2**-6)


def test_a_state_takes_the_dtype_of_the_keys() -> None:
    inputs = make_inputs(3, previous=2, dtype=torch.float32)
    halves = {name: tensor if "state" in name else tensor.bfloat16() for name, tensor in inputs.items()}
    assert attend(**halves)[1][0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, r"q has shape \[2, 3, 8\]; must be \[B, T, H, K\]"),
        ({"q": torch.zeros(2, 3, 5, 8)}, "k has 2 heads; must divide the 5 heads of q"),
        ({"k": torch.zeros(2, 4, 2, 8)}, "k has shape"),
        ({"v": torch.zeros(2, 3, 1, 8)}, "v has shape"),
        ({"v": torch.zeros(2, 3, 2, 8, dtype=torch.float64)}, "dtypes torch.float32, torch.float32, torch.float64"),
        ({"initial_state": (torch.zeros(2, 5, 1, 8),) * 2}, "initial_state k has shape"),
        ({"initial_state": (torch.zeros(2, 5, 2, 8), torch.zeros(2, 4, 2, 8))}, "initial_state v has shape"),
        ({"layout": Layout(torch.zeros(2, 1, dtype=torch.int64))}, "layout.positions"),
        ({"impl": "triton"}, "choose one of auto, chunked, reference, sdpa, flex, flash_attn, fla"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3, dtype=torch.float32) | wrong
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
    with pytest.raises(ValueError, match=message):
        local_attention(**arguments, window=2)
    with pytest.raises(ValueError, match="window is 0; must be >= 1"):
        local_attention(**make_inputs(3), window=0)
