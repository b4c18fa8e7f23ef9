"""attention's own tiles: their sizes, what they see, their registered passes, and mistakes that must be noticed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import Layout, attention
from ops.attention import chunked
from ops.attention.inputs import prepend as chunked_prepend
from tests.ops.compare import assert_equal, error, evaluate, layouts, packed_positions
from tests.ops.largest import LargestTensor
from tests.ops.test_attention import IMPLS, attend, make_inputs

WINDOWS = pytest.mark.parametrize("options", [{}, {"window": 20}])


@WINDOWS
@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("size", [1, 1 << 13, 1 << 15])
def test_any_size_of_a_tile(size: int, kind: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of one row, some groups, and rows together whose documents start at different keys."""
    monkeypatch.setattr(chunked, "TILE", size)
    inputs, layout = make_inputs(150, previous=3, heads=6, groups=3), layouts(150)[kind]
    expected = evaluate(attend, inputs, layout=layout, impl="reference", **options)
    assert_equal(evaluate(attend, inputs, layout=layout, impl="chunked", **options), expected, 1e-13)


@WINDOWS
def test_nothing_is_read_where_that_would_wait(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: the keys that documents hide are masked, not skipped."""
    monkeypatch.setattr(chunked, "_may_read", lambda device: False)
    inputs, layout = make_inputs(150, previous=3), layouts(150)["continued"]
    expected = evaluate(attend, inputs, layout=layout, impl="reference", **options)
    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__int__", "__bool__"):
            patched.setattr(Tensor, name, lambda *_: pytest.fail("a value was read"))
        leaves = {name: z.requires_grad_() for name, z in inputs.items()}
        o, _ = attend(**leaves, layout=layout, impl="chunked", **options)
        gradients = torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))
    torch.testing.assert_close(o, expected["output"])
    again = torch.autograd.grad(
        attend(**leaves, layout=layout, impl="reference", **options)[0].sum(), [*leaves.values()]
    )
    torch.testing.assert_close(gradients, again)


def test_attention_holds_scores_of_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows with T x T is sdpa's mask, which all heads share; chunked holds those of 64 queries of a key head."""
    monkeypatch.setattr(chunked, "TILE", 1)
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(512).items()}
    sizes = {}
    for impl in IMPLS:
        with LargestTensor() as largest:
            attention(**inputs, layout=Layout(packed_positions(512)), impl=impl)[0].sum().backward()
        sizes[impl] = largest.numel
    assert sizes == {"reference": 2 * 4 * 512 * 512, "sdpa": 2 * 512 * 512, "chunked": 2 * 64 * 512}


@WINDOWS
def test_keys_of_other_documents_are_skipped(options: dict[str, int]) -> None:
    layout = Layout(packed_positions(256, cuts=(64, 128, 192))[:1])
    inputs = {name: z[:1] for name, z in make_inputs(256).items()}
    k = inputs["k"].transpose(1, 2)
    oldest = chunked.oldest_keys(layout.positions, 0, options.get("window"))
    tiles = [*chunked._tiles(inputs["q"], k, oldest, options.get("window"))]
    assert [(tile.seen.start, tile.seen.stop) for tile in tiles] == [(0, 64), (64, 128), (128, 192), (192, 256)]


@settings(max_examples=10, deadline=None)
@given(
    time=st.integers(2, 150), cut=st.integers(1, 149), start=st.integers(0, 149), window=st.none() | st.integers(1, 99)
)
def test_any_split_and_any_order_of_rows(time: int, cut: int, start: int, window: int | None) -> None:
    """With a document that starts anywhere, or (at 0) a row that continues one."""
    op = partial(attend, impl="chunked", **({} if window is None else {"window": window}))
    inputs, positions = make_inputs(time, previous=3), packed_positions(time, first=3, cuts=(start,) if start else ())
    o, state = op(**inputs, layout=Layout(positions))
    swapped, _ = op(**{name: z.flip(0) for name, z in inputs.items()}, layout=Layout(positions.flip(0)))
    torch.testing.assert_close(swapped.flip(0), o, rtol=0, atol=1e-12)
    if cut < time:
        before, after = ({n: inputs[n][:, part] for n in "qkv"} for part in (slice(0, cut), slice(cut, time)))
        held = {"state_k": inputs["state_k"], "state_v": inputs["state_v"]}
        first, (k, v) = op(**before, **held, layout=Layout(positions[:, :cut]))
        second, end = op(**after, state_k=k, state_v=v, layout=Layout(positions[:, cut:]))
        torch.testing.assert_close(torch.cat([first, second], dim=1), o, rtol=0, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(end, state))


@WINDOWS
@pytest.mark.parametrize("impl", ["chunked", "sdpa"])
def test_documents_do_not_see_each_other(impl: str, options: dict[str, int]) -> None:
    """What the first document holds, and the keys before it, have no part in the second, nor gradients from it."""
    inputs = {name: z.requires_grad_() for name, z in make_inputs(100, previous=3).items()}
    layout = Layout(packed_positions(100, first=3, cuts=(70,))[:1].repeat(2, 1))
    o, _ = attend(**inputs, layout=layout, impl=impl, **options)
    gradients = torch.autograd.grad(o[:, 70:].square().sum(), [*inputs.values()])
    assert all(not z[:, :70].any() for z in gradients)
    assert all(z[:, 70:].any() for z in gradients[:3])


@WINDOWS
@pytest.mark.parametrize("impl", ["chunked", "sdpa"])
def test_strided_inputs(impl: str, options: dict[str, int]) -> None:
    """Heads cut from one wide projection, and a state that lies transposed."""
    inputs, layout = make_inputs(70, previous=3), layouts(70)["continued"]
    wide = torch.cat([inputs[name].flatten(2) for name in "qkv"], dim=2)
    q, k, v = (z.unflatten(2, (-1, 8)) for z in wide.split([32, 16, 16], dim=2))
    strided = {n: z.transpose(1, 2).contiguous().transpose(1, 2) for n, z in inputs.items() if "state" in n}
    strided = {"q": q, "k": k, "v": v} | strided
    assert not any(z.is_contiguous() for z in strided.values())
    expected = evaluate(attend, inputs, layout=layout, impl=impl, **options)
    assert_equal(evaluate(attend, strided, layout=layout, impl=impl, **options), expected, 1e-14)


@WINDOWS
def test_gradcheck(options: dict[str, int]) -> None:
    inputs = make_inputs(5, previous=2, heads=2, groups=1, width=2)
    layout = Layout(packed_positions(5, first=1, cuts=(2,)))
    leaves = [z.requires_grad_() for z in inputs.values()]

    def function(*leaves: Tensor) -> Tensor:
        return attend(**dict(zip(inputs, leaves)), layout=layout, impl="chunked", **options)[0]

    assert torch.autograd.gradcheck(function, leaves)


def test_registered_ops() -> None:
    q, k, v = (z.requires_grad_() for z in make_inputs(70, dtype=torch.float32).values())
    for oldest, window in ((None, None), (chunked.oldest_keys(packed_positions(70), 0, 20), 20)):
        torch.library.opcheck(chunked.forward, (q, k, v, oldest, window, 0.3))
        detached = (z.detach() for z in (q, q, k, v))
        torch.library.opcheck(chunked.backward, (*detached, oldest, window, 0.3))


def without_the_sum(dweights: Tensor, weights: Tensor, *_: Any, grad_input: Tensor) -> Tensor:
    return torch.mul(dweights, weights, out=grad_input)


def overwriting(self: Any, total: Tensor, part: Tensor) -> None:
    place = total[self.rows, self.groups, self.seen]
    place.copy_(part.view(place.shape))


def without_the_state(state: Any, k: Tensor, v: Tensor) -> Any:
    return chunked_prepend(tuple(torch.zeros_like(z) for z in state), k, v)


def without_the_last_key(build: Callable[..., Any]) -> Callable[..., Any]:
    def visible(*arguments: Any) -> tuple[slice, Tensor]:
        seen, hidden = build(*arguments)
        return slice(seen.start + 1, seen.stop), hidden[..., -(seen.stop - seen.start - 1) :]

    return visible


@pytest.mark.parametrize(
    ("place", "name", "mutant", "wrong"),
    [
        (torch, "_softmax_backward_data", without_the_sum, "d q"),
        (chunked._Tile, "add", overwriting, "d k"),
        (chunked, "prepend", without_the_state, "output"),
        (chunked, "_visible", without_the_last_key(chunked._visible), "output"),
        (chunked, "oldest_keys", lambda positions, *_: torch.zeros_like(positions), "output"),
    ],
)
def test_mistakes_are_noticed(place: Any, name: str, mutant: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(150, previous=7)
    layout = Layout(packed_positions(150, first=7))
    expected = evaluate(attend, inputs, layout=layout, impl="reference")
    monkeypatch.setattr(place, name, mutant)
    found = evaluate(attend, inputs, layout=Layout(layout.positions), impl="chunked")
    assert not error(found[wrong], expected[wrong]) <= 1e-3  # or NaN
