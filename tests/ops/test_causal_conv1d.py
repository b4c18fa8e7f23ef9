"""causal_conv1d: chunked against the time loop, both against torch's conv1d."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from ops import Layout, causal_conv1d
from ops.causal_conv1d import chunked
from ops.causal_conv1d.chunked import CausalConv1d, tap_masks
from tests.ops.compare import (
    LENGTHS,
    Inputs,
    assert_earned,
    assert_equal,
    assert_packed_equals_separate,
    assert_split_equals_whole,
    error,
    evaluate,
    layouts,
    packed_positions,
)

conv = partial(causal_conv1d, output_final_state=True)


def conv_from(*, state: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    return conv(**arguments, initial_state=state)


def make_inputs(time: int, *, window: int = 4, width: int = 5, dtype: torch.dtype = torch.float64) -> Inputs:
    return {
        "x": torch.randn(2, time, width, dtype=dtype),
        "weight": torch.randn(width, window, dtype=dtype),
        "bias": torch.randn(width, dtype=dtype),
        "initial_state": torch.randn(2, window - 1, width, dtype=dtype),
    }


def without_state(inputs: Inputs) -> Inputs:
    return {name: z[:1] if name == "x" else z for name, z in inputs.items() if name != "initial_state"}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_is_torch_conv1d(impl: str) -> None:
    inputs = make_inputs(37)
    expected = conv1d(
        pad(inputs["x"].transpose(1, 2), (3, 0)), inputs["weight"][:, None], inputs["bias"], groups=5
    ).transpose(1, 2)
    y, state = causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"], impl=impl)
    assert state is None
    torch.testing.assert_close(y, expected)
    without_bias, _ = causal_conv1d(inputs["x"], inputs["weight"], impl=impl)
    torch.testing.assert_close(without_bias, expected - inputs["bias"])
    activated, _ = causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"], activation="silu", impl=impl)
    torch.testing.assert_close(activated, expected * expected.sigmoid())


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize(
    "time", [1, 2, 3, 17, 65, *(pytest.param(t, marks=pytest.mark.slow) for t in LENGTHS if t not in (1, 2, 17, 65))]
)
def test_chunked_equals_reference(time: int, window: int, kind: str) -> None:
    inputs, layout = make_inputs(time, window=window), layouts(time)[kind]
    expected = evaluate(conv, inputs, layout=layout, impl="reference")
    assert_equal(evaluate(conv, inputs, layout=layout, impl="chunked"), expected, 1e-13)
    assert_earned(partial(conv, activation="silu"), make_inputs(time, window=window, width=64), layout=layout)


def test_gradcheck() -> None:
    inputs = make_inputs(7)
    leaves = [inputs["initial_state"], inputs["x"], inputs["weight"], inputs["bias"]]
    masks = tap_masks(packed_positions(7, first=2, cuts=(2, 3)), 4, torch.float64)

    def function(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return CausalConv1d.apply(torch.cat([state, x], dim=1), weight, bias, masks)

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_packed_equals_separate(impl: str) -> None:
    assert_packed_equals_separate(conv, without_state(make_inputs(100)), impl=impl, tolerance=1e-13)


def test_dropped_masks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "tap_masks", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_packed_equals_separate(conv, without_state(make_inputs(100)), impl="chunked", tolerance=1e-13)


@pytest.mark.parametrize(
    ("name", "dropped", "wrong"),
    [
        ("forward", 0, "output"),
        ("backward", 0, "d initial_state"),
        ("backward", 1, "d weight"),
        ("backward", 2, "d bias"),
    ],
)
def test_a_dropped_term_is_caught(name: str, dropped: int, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The carried state on the way forward, and each of the gradients on the way back."""
    real, inputs = getattr(CausalConv1d, name), make_inputs(9)

    def mutant(ctx: Any, *arguments: Any) -> Any:
        if name == "forward":
            held = arguments[0].clone()
            held[:, :3] = 0
            return real(ctx, held, *arguments[1:])
        gradients = list(real(ctx, *arguments))
        gradients[dropped] = torch.zeros_like(gradients[dropped])
        return tuple(gradients)

    expected = evaluate(conv, inputs, impl="reference")
    monkeypatch.setattr(CausalConv1d, name, staticmethod(mutant))
    assert error(evaluate(conv, inputs, impl="chunked")[wrong], expected[wrong]) > 1e-3


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_split_equals_whole(impl: str, kind: str) -> None:
    inputs = {name: z for name, z in make_inputs(40).items() if name != "initial_state"}
    assert_split_equals_whole(
        conv_from, inputs, cuts=(1, 2, 17, 33), impl=impl, tolerance=1e-13, layout=layouts(40)[kind]
    )


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_bf16_is_summed_in_fp32(impl: str) -> None:
    inputs = make_inputs(65, dtype=torch.float32)
    x = inputs["x"].bfloat16()
    y, state = conv(x, inputs["weight"], inputs["bias"], impl=impl)
    exact, _ = conv(x.double(), inputs["weight"].double(), inputs["bias"].double(), impl="reference")
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_strided_inputs() -> None:
    inputs = make_inputs(33)
    strided = inputs | {
        "x": inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": inputs["weight"].T.clone().T,
    }
    assert_equal(evaluate(conv, strided, impl="chunked"), evaluate(conv, inputs, impl="chunked"), 1e-15)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x has shape"),
        ({"weight": torch.zeros(4, 4)}, r"weight has shape \[4, 4\]; must be \[D, W\] = \[5, 4\]"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"initial_state": torch.zeros(2, 4, 5)}, r"\[B, W-1, D\] = \[2, 3, 5\]"),
        ({"activation": "gelu"}, "activation is 'gelu'; must be None or 'silu'"),
        ({"layout": Layout(torch.zeros(1, 1, dtype=torch.int64))}, "layout.positions"),
        ({"impl": "cudnn"}, "causal_conv1d has no implementation .cudnn.; choose one of auto, chunked, reference"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_inputs(3) | wrong
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments)
