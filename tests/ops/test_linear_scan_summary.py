"""linear_scan_summary: slices exchanged as affine maps are the sequence that was cut."""

from functools import reduce
from itertools import product

import pytest
import torch
from torch import Tensor

from ops import Affine, Layout, linear_scan_summary
from ops.linear_scan import chunked
from tests.ops.compare import DEVICE, SLOW, Inputs, assert_equal, error, layouts, packed_positions
from tests.ops.test_linear_scan import make_inputs
from tests.ops.test_linear_scan_properties import scan
from tests.ops.test_linear_scan_triton import DTYPE, TOLERANCE, short_words

__all__ = ["short_words"]  # a fixture that every test here uses

TIME = 26
CUTS = {2: (0, 9, 26), 3: (0, 1, 16, 26), 5: (0, 2, 3, 15, 16, 26)}


def summary(x: Tensor, log_decay: Tensor, layout: Layout | None, impl: str) -> Affine:
    layout = None if layout is None else Layout(layout.positions.to(DEVICE))
    found = linear_scan_summary(x.to(DEVICE), log_decay.to(DEVICE), layout=layout, impl=impl)
    return Affine(*(z.to(x.device) for z in found))


def run(inputs: Inputs, layout: Layout | None, borders: tuple[int, ...], impl: str) -> list[Tensor]:
    """Output, last state and gradients of slices that know the states before them from summaries alone."""
    leaves = {name: z.detach().requires_grad_() for name, z in inputs.items()}
    slices = []
    for start, end in zip(borders, borders[1:]):
        here = None if layout is None else Layout(layout.positions[:, start:end])
        slices.append((leaves["x"][:, start:end], leaves["log_decay"][:, start:end], here))
    maps = [summary(*part, impl) for part in slices]
    outputs = []
    for i, (x, log_decay, here) in enumerate(slices):
        state = reduce(Affine.then, maps[:i])(leaves["initial_state"]) if i else leaves["initial_state"]
        y, state = scan(x=x, log_decay=log_decay, layout=here, initial_state=state, impl=impl)
        outputs.append(y)
    kept = [torch.cat(outputs, dim=1), state, reduce(Affine.then, maps)(leaves["initial_state"])]
    generator = torch.Generator().manual_seed(0)
    loss = sum((z * torch.randn(z.shape, generator=generator, dtype=z.dtype)).sum() for z in kept)
    return [*(z.detach() for z in kept), *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize(
    ("slices", "impl", "kind"),
    [
        *product((2, 3, 5), ("chunked",), ("none", "packed", "continued")),
        *(
            pytest.param(n, "triton", kind, marks=SLOW)
            for n, kind in ((2, "none"), (3, "packed"), (5, "packed"), (5, "continued"))
        ),
    ],
)
def test_slices_are_the_whole(slices: int, impl: str, kind: str) -> None:
    inputs = make_inputs(TIME, width=2, dtype=DTYPE)
    positions = None if kind == "none" else layouts(TIME)[kind].positions.clone()
    if positions is not None:
        positions[1, 16:] = torch.arange(TIME - 16)  # a document that starts at the border of a slice
    layout = None if positions is None else Layout(positions)
    expected = run(inputs, layout, (0, TIME), "chunked")
    for actual, wanted in zip(run(inputs, layout, CUTS[slices], impl), expected):
        assert error(actual, wanted) <= TOLERANCE


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_summary_is_the_map_of_the_state(impl: str) -> None:
    """One document goes on through the slice, in the other row one starts, and the state before is forgotten."""
    inputs = make_inputs(13, width=3, dtype=DTYPE)
    layout = Layout(packed_positions(13, first=4, cuts=(7,)))
    found = summary(inputs["x"], inputs["log_decay"], layout, impl)
    assert torch.equal(found.transition[0], torch.zeros(3, dtype=DTYPE))
    torch.testing.assert_close(found.transition[1], inputs["log_decay"][1].sum(0).exp(), rtol=1e-6, atol=0)
    _, state = scan(**inputs, layout=layout, impl="reference")
    assert_equal({"state": found(inputs["initial_state"])}, {"state": state}, TOLERANCE)


@pytest.mark.skipif(torch.float32 == DTYPE, reason="float64 runs under the interpreter only")
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_gradcheck(impl: str) -> None:
    inputs = make_inputs(5, width=2)
    leaves = [inputs[name].requires_grad_() for name in ("x", "log_decay")]
    layout = Layout(packed_positions(5, first=2, cuts=(2,)))
    assert torch.autograd.gradcheck(lambda x, d: tuple(summary(x, d, layout, impl)), leaves, fast_mode=impl == "triton")


def test_a_dropped_reset_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = chunked.summary
    monkeypatch.setattr(chunked, "summary", lambda x, log_decay, starts: real(x, log_decay, None))
    with pytest.raises(AssertionError):
        test_slices_are_the_whole(3, "chunked", "packed")


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_extreme_decays(impl: str) -> None:
    x = torch.randn(1, 9, 3)
    log_decay = torch.tensor([0.0, -1e4, -torch.inf]).expand(1, 9, 3)
    leaves = [x.requires_grad_(), log_decay.clone().requires_grad_()]
    found = summary(*leaves, None, impl)
    torch.testing.assert_close(found.transition.detach(), torch.tensor([[1.0, 0.0, 0.0]]), rtol=0, atol=0)
    torch.testing.assert_close(found.offset[0], torch.stack([x[0, :, 0].sum(), x[0, -1, 1], x[0, -1, 2]]))
    assert all(z.isfinite().all() for z in torch.autograd.grad(found.transition.sum() + found.offset.sum(), leaves))


def test_bf16_inputs_give_fp32_maps() -> None:
    x = torch.randn(1, 40, 2).bfloat16()
    found, exact = (summary(z, -z.abs(), None, "chunked") for z in (x, x.double()))
    assert {z.dtype for z in found} == {torch.float32}
    for z, expected in zip(found, exact):
        torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "fla"])
def test_other_implementations_are_refused(impl: str) -> None:
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="choose one of auto, chunked"):
        linear_scan_summary(x, x, impl=impl)
