"""attention's own tiles: their sizes, what they see, their registered passes, and mistakes that must be noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import Layout
from ops.attention import chunked
from tests.ops.compare import assert_equal, error, evaluate, layouts, packed_positions
from tests.ops.test_attention import attend, make_inputs

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


@WINDOWS
def test_keys_of_other_documents_are_skipped(options: dict[str, int]) -> None:
    layout = Layout(packed_positions(256, cuts=(64, 128, 192))[:1])
    inputs = {name: z[:1] for name, z in make_inputs(256).items()}
    k = inputs["k"].transpose(1, 2)
    oldest = chunked.oldest_keys(layout.positions, 0, options.get("window"))
    tiles = [*chunked._tiles(inputs["q"], k, oldest, options.get("window"))]
    assert [(tile.seen.start, tile.seen.stop) for tile in tiles] == [(0, 64), (64, 128), (128, 192), (192, 256)]


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
        (chunked, "_visible", without_the_last_key(chunked._visible), "output"),
        (chunked, "oldest_keys", lambda positions, *_: torch.zeros_like(positions), "output"),
    ],
)
def test_mistakes_are_noticed(place: Any, name: str, mutant: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(150)
    layout = Layout(packed_positions(150))
    expected = evaluate(attend, inputs, layout=layout, impl="reference")
    monkeypatch.setattr(place, name, mutant)
    found = evaluate(attend, inputs, layout=Layout(layout.positions), impl="chunked")
    assert not error(found[wrong], expected[wrong]) <= 1e-3  # or NaN
