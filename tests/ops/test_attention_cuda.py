"""The tiers "flex" and "flash_attn", which need a GPU: here their masks, and what they ask of torch and the package."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.functional import pad, scaled_dot_product_attention

from ops import Layout, attention, local_attention
from ops.attention import flash_attn, flex
from ops.attention.inputs import State
from ops.attention.sdpa import visible_keys
from ops.impl import GPU_ONLY
from tests.ops.compare import DEVICE, SLOW, Inputs, assert_earned, assert_equal, evaluate, layouts, packed_positions
from tests.ops.flash_attn_imitation import imitation
from tests.ops.largest import LargestTensor

# Below, at and above one and two blocks of 128; states without, inside and beyond a block and a window.
CASES = [
    (65, 3, 1),
    (1, None, None),
    (1, 9, 4),
    (128, None, None),
    (129, 3, 7),
    (130, 300, 100),
    (256, 128, None),
    (257, None, 130),
    (300, 70, 20),
]


def attend(
    q: Tensor, k: Tensor, v: Tensor, state_k: Tensor | None = None, state_v: Tensor | None = None, **options: Any
) -> tuple[Tensor, Any]:
    state: State | None = None if state_k is None or state_v is None else (state_k, state_v)
    op: Callable[..., Any] = attention if options.get("window") is None else local_attention
    if op is attention:
        options.pop("window", None)
    return op(q, k, v, initial_state=state, **options)


def make_inputs(time: int, previous: int | None = None, heads: int = 4, groups: int = 2) -> Inputs:
    shapes = {"q": (time, heads), "k": (time, groups), "v": (time, groups)}
    if previous is not None:
        shapes |= {"state_k": (previous, groups), "state_v": (previous, groups)}
    return {name: torch.randn(2, *shape, 16) for name, shape in shapes.items()}


def dense_flex(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float, enable_gqa: bool) -> Tensor:
    """FlexAttention as documented: whole blocks without the mask, partial ones under it, nothing else; differentiable,
    which torch's own is not on a CPU."""
    batch, _, time, _ = q.shape
    num_keys = k.shape[2]

    def chosen(count: Tensor, index: Tensor) -> Tensor:  # bool [B, 1, T, S+T]
        listed = torch.arange(index.shape[-1]) < count[..., None]
        blocks = torch.zeros_like(index, dtype=torch.bool).scatter(-1, index.long(), listed)
        return blocks.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :time, :num_keys]

    partial = chosen(block_mask.kv_num_blocks, block_mask.kv_indices)
    whole = chosen(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    mask = torch_flex.create_mask(block_mask.mask_mod, batch, 1, time, num_keys, device="cpu")
    return scaled_dot_product_attention(q, k, v, attn_mask=(partial & mask) | whole, scale=scale, enable_gqa=enable_gqa)


@pytest.fixture
def flex_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.delitem(GPU_ONLY, "flex")
        monkeypatch.setattr(flex, "_kernel", lambda: dense_flex)


@pytest.fixture
def flash_attn_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", imitation())
    monkeypatch.delitem(GPU_ONLY, "flash_attn")
    monkeypatch.setattr(flash_attn, "DTYPES", (torch.float64,))


@pytest.mark.parametrize("kind", ["packed", "continued"])
@pytest.mark.parametrize(("time", "previous", "window"), CASES)
def test_block_mask_is_what_a_query_sees(time: int, previous: int | None, window: int | None, kind: str) -> None:
    layout, previous = layouts(time)[kind], previous or 0
    assert layout is not None
    mask = layout.derive(flex.block_mask, previous, window)
    seen = torch_flex.create_mask(mask.mask_mod, 2, 1, time, previous + time, device="cpu")
    assert torch.equal(seen, visible_keys(layout.positions, previous, window))
    expected = torch_flex.create_block_mask(mask.mask_mod, 2, None, time, previous + time, device="cpu")
    assert mask.shape == expected.shape
    assert torch.equal(mask.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name


@settings(max_examples=20, deadline=None)
@given(
    time=st.integers(1, 400),
    window=st.none() | st.integers(1, 300),
    previous=st.integers(0, 300),
    first=st.integers(0, 300),
    cuts=st.lists(st.integers(1, 399), max_size=4).map(sorted),
)
def test_any_block_mask(time: int, window: int | None, previous: int, first: int, cuts: list[int]) -> None:
    """A block is visited iff a query of it sees a key of it, and without the mask iff all of its 128 see all 128."""
    positions = packed_positions(time, first=first, cuts=cuts)
    mask = flex.block_mask(positions, previous, window)
    seen = visible_keys(positions, previous, window)[:, 0]
    seen = pad(seen, (0, -seen.shape[2] % 128, 0, -time % 128)).unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    some, whole = seen.any(4).any(2), seen.all(4).all(2)
    assert torch.equal(mask.full_kv_num_blocks[:, 0], whole.sum(2, dtype=torch.int32))
    assert torch.equal(mask.kv_num_blocks[:, 0], (some & ~whole).sum(2, dtype=torch.int32))
    assert torch.equal(mask.to_dense()[:, 0].bool(), some)


@pytest.mark.skipif(DEVICE != "cpu", reason="uncompiled, torch's own holds the scores")
@pytest.mark.parametrize(
    ("time", "previous", "window", "kind"),
    [(130, 300, 100, "continued"), pytest.param(257, None, None, "none", marks=SLOW)],
)
def test_uncompiled_flex_attention_is_the_reference(
    time: int, previous: int | None, window: int | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_kernel", lambda: torch_flex.flex_attention)
    monkeypatch.delitem(GPU_ONLY, "flex")
    inputs, options = make_inputs(time, previous), {"layout": layouts(time)[kind], "window": window, "scale": 0.3}
    o, _ = attend(**inputs, **options, impl="flex")
    torch.testing.assert_close(o, attend(**inputs, **options, impl="reference")[0])


@pytest.mark.parametrize("window", [None, pytest.param(20, marks=SLOW)])
def test_flex_compiles_inside_a_whole_graph(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.delitem(GPU_ONLY, "flex")
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(140).items()}

    def twice(layout: Layout, impl: str) -> Tensor:
        o, _ = attend(**inputs, layout=layout, window=window, impl=impl)
        return o + attend(o, inputs["k"], inputs["v"], layout=layout, window=window, impl=impl)[0]

    positions = packed_positions(140).to(DEVICE)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    with torch.no_grad():
        found = compiled(Layout(positions), "flex")
    torch.testing.assert_close(found, twice(Layout(positions), "reference"))


@pytest.mark.usefixtures("flex_here")
@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize(("time", "previous", "window"), CASES[3:])
def test_flex_error_is_earned(time: int, previous: int | None, window: int | None, kind: str) -> None:
    inputs = make_inputs(time, previous)
    assert_earned(attend, inputs, impl="flex", layout=layouts(time)[kind], window=window)


@pytest.mark.usefixtures("flex_here")
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (2, 2), (6, 2)])
def test_flex_groups(heads: int, groups: int) -> None:
    inputs = make_inputs(130, 5, heads, groups)
    assert_earned(attend, inputs, impl="flex", layout=layouts(130)["continued"])


@SLOW
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU compiles with its own backend")
def test_flex_compiles_once_and_once_more_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packings, windows and first positions share a kernel; lengths share the second one. Torch's limit is lifted."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(flex, "_kernel", lambda: flex.compiled(counter))
    monkeypatch.delitem(GPU_ONLY, "flex")
    frames = []
    for time, previous, window, cuts in [
        (130, 0, None, (1, 2)),
        (130, 0, None, (5, 70, 100)),
        (130, 0, 32, (1,)),
        (300, 0, None, (1,)),
        (400, 0, 20, (1,)),
        (150, 170, None, (1,)),
    ]:
        layout = Layout(packed_positions(time, first=previous, cuts=cuts))
        inputs = make_inputs(time, previous)
        with torch._dynamo.config.patch(recompile_limit=1):
            o, _ = attend(**inputs, layout=layout, window=window, impl="flex")
        torch.testing.assert_close(o, attend(**inputs, layout=layout, window=window, impl="reference")[0])
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1, 2, 2, 2]


def test_flex_holds_no_mask_of_all_pairs() -> None:
    with LargestTensor() as largest:
        Layout(packed_positions(2048)).derive(flex.block_mask, 0, None)
    assert largest.numel == 2 * 2048


@pytest.mark.usefixtures("flex_here")
def test_the_block_mask_is_built_once_per_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    build = flex.visible_blocks
    monkeypatch.setattr(flex, "visible_blocks", lambda *args: calls.append(args) or build(*args))
    layout = Layout(packed_positions(20).to(DEVICE))
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(20).items()}
    for _ in range(3):
        attend(**inputs, layout=layout, impl="flex")
    assert len(calls) == 1


@pytest.mark.usefixtures("flash_attn_here")
@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize(("time", "previous", "window"), CASES)
def test_flash_attn_equals_reference(time: int, previous: int | None, window: int | None, kind: str) -> None:
    assert_flash_attn_equals_reference(time, previous, window, layouts(time)[kind])


def assert_flash_attn_equals_reference(
    time: int, previous: int | None, window: int | None, layout: Layout | None
) -> None:
    inputs = {name: tensor.double() for name, tensor in make_inputs(time, previous).items()}
    expected = evaluate(attend, inputs, impl="reference", layout=layout, window=window, output_final_state=True)
    found = evaluate(attend, inputs, impl="flash_attn", layout=layout, window=window, output_final_state=True)
    assert_equal(found, expected, 1e-12)


@pytest.mark.usefixtures("flash_attn_here")
def test_flash_attn_sees_a_part_of_the_state() -> None:
    """A row that starts a document sees nothing of it, one that continues a document what belongs to that one."""
    positions = torch.stack([torch.arange(20), torch.arange(5, 25)])
    positions[1, 9:] = torch.arange(11)
    for previous in (3, 5, 8):
        assert_flash_attn_equals_reference(20, previous, None, Layout(positions))
        assert_flash_attn_equals_reference(20, previous, 4, Layout(positions))


@pytest.mark.usefixtures("flash_attn_here")
@pytest.mark.parametrize("mutant", ["documents joined", "whole state seen", "gradients of unseen keys kept"])
def test_a_wrong_border_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = flash_attn.find_borders

    def wrong(positions: Tensor, num_previous: int) -> flash_attn.Borders:
        if mutant == "documents joined":
            return find(torch.arange(2, 22).repeat(2, 1), num_previous)
        if mutant == "whole state seen":
            return find(positions + num_previous * (positions < 18).cummin(1).values, num_previous)
        borders = find(positions, num_previous)
        return borders._replace(in_use=torch.ones_like(borders.in_use))

    layout = Layout(packed_positions(20, first=2))
    assert_flash_attn_equals_reference(20, 4, None, layout)
    monkeypatch.setattr(flash_attn, "find_borders", wrong)
    with pytest.raises(AssertionError):
        assert_flash_attn_equals_reference(20, 4, None, Layout(layout.positions))


@pytest.mark.usefixtures("flex_here")
@pytest.mark.parametrize(
    ("impl", "inputs", "message"),
    [
        ("flex", {"dtype": torch.float64}, "attention: the inputs are torch.float64; 'flex' needs fp32, bf16 or fp16"),
        ("flex", {"width": 12}, "q has 12 features a head; 'flex' needs 16 to 256; choose 'chunked'"),
        ("flex", {"width": 300}, "q has 300 features a head; 'flex' needs 16 to 256; choose 'chunked'"),
        ("flash_attn", {"dtype": torch.float32}, "the inputs are torch.float32; 'flash_attn' needs bf16 or fp16"),
        ("flash_attn", {"width": 300}, "q has 300 features a head; 'flash_attn' needs 256 at most"),
    ],
)
def test_refuses(impl: str, inputs: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", imitation())
    monkeypatch.delitem(GPU_ONLY, "flash_attn")
    q = torch.zeros(1, 3, 2, inputs.get("width", 16), dtype=inputs.get("dtype", torch.bfloat16), device=DEVICE)
    for window in (None, 2):
        with pytest.raises(ValueError, match=message):
            attend(q, q, q, window=window, impl=impl)


@pytest.mark.skipif(DEVICE != "cpu", reason="they run on a GPU")
@pytest.mark.parametrize("impl", ["flex", "flash_attn"])
def test_need_a_gpu(impl: str) -> None:
    q = torch.zeros(1, 3, 2, 16)
    with pytest.raises(
        ValueError, match=f"{impl!r} cannot run on device 'cpu': it needs .*; choose one of auto, chunked"
    ):
        attend(q, q, q, impl=impl)


def test_autocast_narrows_and_widens(flex_here: None) -> None:
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(20, 3).items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        o, _ = attend(**inputs, impl="flex")
    assert o.dtype == torch.float32
    expected, _ = attend(**{name: tensor.bfloat16() for name, tensor in inputs.items()}, impl="flex")
    assert torch.equal(o, expected.float())
