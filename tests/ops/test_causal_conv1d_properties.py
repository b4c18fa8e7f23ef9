"""What must hold of every parallel form of causal_conv1d: splits, documents, batches, compilers."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops import Layout, causal_conv1d
from tests.ops.compare import (
    DEVICE,
    SLOW,
    assert_packed_equals_separate,
    assert_split_equals_whole,
    layouts,
    packed_positions,
)
from tests.ops.test_causal_conv1d import make_inputs, without_state
from tests.ops.test_causal_conv1d_triton import DTYPE, TOLERANCE, conv, short_segments

__all__ = ["short_segments"]  # a fixture that every test here uses

IMPLS = ["chunked", "triton"]
few_examples = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def conv_from(*, state: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    return conv(**arguments, initial_state=state)


@SLOW
def test_packed_equals_separate() -> None:
    inputs = without_state(make_inputs(18, dtype=DTYPE))
    assert_packed_equals_separate(conv, inputs, impl="triton", tolerance=TOLERANCE)


@SLOW
@pytest.mark.parametrize("kind", ["none", "packed"])
def test_split_equals_whole(kind: str) -> None:
    inputs = {name: z for name, z in make_inputs(9, dtype=DTYPE).items() if name != "initial_state"}
    layout = layouts(9)[kind]
    assert_split_equals_whole(conv_from, inputs, cuts=(1, 3), impl="triton", tolerance=TOLERANCE, layout=layout)


@SLOW
@few_examples
@given(
    time=st.integers(1, 9),
    window=st.integers(1, 6),
    cut=st.integers(0, 8),
    borders=st.lists(st.integers(1, 8), max_size=2),
    impl=st.sampled_from(IMPLS),
)
def test_any_split_carries_on(time: int, window: int, cut: int, borders: list[int], impl: str) -> None:
    inputs = {n: z for n, z in make_inputs(time, window=window, dtype=DTYPE).items() if n != "initial_state"}
    layout = Layout(packed_positions(time, cuts=sorted(borders)))
    cuts = (cut,) if 0 < cut < time else ()
    assert_split_equals_whole(conv_from, inputs, cuts=cuts, impl=impl, tolerance=TOLERANCE, layout=layout)


@few_examples
@given(time=st.integers(1, 12), seed=st.integers(0, 99), impl=st.sampled_from(IMPLS))
def test_permuting_the_batch_permutes_the_output(time: int, seed: int, impl: str) -> None:
    inputs, layout = make_inputs(time, dtype=DTYPE), Layout(packed_positions(time, first=1))
    order = torch.randperm(2, generator=torch.Generator().manual_seed(seed))
    permuted = inputs | {name: inputs[name][order] for name in ("x", "initial_state")}
    y, state = conv(**inputs, layout=layout, impl=impl)
    y_permuted, state_permuted = conv(**permuted, layout=Layout(layout.positions[order]), impl=impl)
    assert torch.equal(y_permuted, y[order])
    assert torch.equal(state_permuted, state[order])


@few_examples
@given(border=st.integers(1, 11), impl=st.sampled_from(IMPLS))
def test_documents_do_not_see_each_other(border: int, impl: str) -> None:
    inputs = make_inputs(12, dtype=DTYPE)
    positions = packed_positions(12, first=2, cuts=(border,)).roll(1, 0)
    changed = inputs | {"x": inputs["x"].clone(), "initial_state": torch.randn(2, 3, 5, dtype=DTYPE)}
    changed["x"][1, :border] = 1e6
    y, changed_y = (conv(**z, layout=Layout(positions), impl=impl)[0] for z in (inputs, changed))
    assert torch.equal(y[1, border:], changed_y[1, border:])
    assert not torch.equal(y[0, :border], changed_y[0, :border])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_is_checkpointed(impl: str) -> None:
    inputs = make_inputs(9, dtype=torch.float32)
    leaves = [z.to(DEVICE).requires_grad_() for z in inputs.values()]
    layout = Layout(packed_positions(9, first=1, cuts=(4,)).to(DEVICE))

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor | None]:
        named = dict(zip(inputs, leaves))
        return causal_conv1d(**named, activation="silu", layout=layout, output_final_state=True, impl=impl)

    def gradients(function: Any) -> list[Tensor]:
        y, state = function(*leaves)
        return [y, state, *torch.autograd.grad(y.square().sum() + state.square().sum(), leaves)]

    expected = gradients(function)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    checkpointed = partial(checkpoint, function, use_reentrant=False)
    with torch.autocast(DEVICE, torch.bfloat16):
        autocast = gradients(function)
    for found in (gradients(compiled), gradients(checkpointed), autocast):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
