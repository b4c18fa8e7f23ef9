"""What must hold of every parallel form of linear_scan: splits, documents, batches, compilers."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops import Layout, linear_scan
from ops.linear_scan import chunked, triton
from tests.ops.compare import (
    DEVICE,
    SLOW,
    assert_packed_equals_separate,
    assert_split_equals_whole,
    layouts,
    packed_positions,
)
from tests.ops.test_linear_scan import make_inputs, without_state
from tests.ops.test_linear_scan_triton import DTYPE, TOLERANCE, short_words

__all__ = ["short_words"]  # a fixture that every test here uses

IMPLS = ["chunked", "triton"]
few_examples = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def scan(*, layout: Layout | None = None, impl: str, **arguments: Tensor) -> tuple[Tensor, Tensor]:
    """linear_scan with its final state, computed on DEVICE."""
    here = {name: z.to(DEVICE) for name, z in arguments.items()}
    layout = None if layout is None else Layout(layout.positions.to(DEVICE))
    y, state = linear_scan(**here, layout=layout, output_final_state=True, impl=impl)
    assert state is not None
    return y.to(arguments["x"].device), state.to(arguments["x"].device)


def scan_from(*, state: Tensor | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    return scan(**arguments) if state is None else scan(**arguments, initial_state=state)


@SLOW
def test_packed_equals_separate() -> None:
    inputs = without_state(make_inputs(18, width=3, dtype=DTYPE))
    assert_packed_equals_separate(scan, inputs, impl="triton", tolerance=TOLERANCE)


@SLOW
def test_a_dropped_reset_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = triton._reset_bits
    monkeypatch.setattr(triton, "_reset_bits", lambda positions: real(positions + 1))
    with pytest.raises(AssertionError):
        test_packed_equals_separate()


@SLOW
@pytest.mark.parametrize("kind", ["none", "packed"])
def test_split_equals_whole(kind: str) -> None:
    inputs = {name: z for name, z in make_inputs(13, dtype=DTYPE).items() if name != "initial_state"}
    layout = layouts(13)[kind]
    assert_split_equals_whole(scan_from, inputs, cuts=(1, 8), impl="triton", tolerance=TOLERANCE, layout=layout)


@SLOW
@few_examples
@given(
    time=st.integers(1, 10),
    cut=st.integers(0, 9),
    borders=st.lists(st.integers(1, 9), max_size=2),
    impl=st.sampled_from(IMPLS),
)
def test_any_split_carries_on(time: int, cut: int, borders: list[int], impl: str) -> None:
    inputs = {name: z for name, z in make_inputs(time, width=2, dtype=DTYPE).items() if name != "initial_state"}
    layout = Layout(packed_positions(time, cuts=sorted(borders)))
    cuts = (cut,) if 0 < cut < time else ()
    assert_split_equals_whole(scan_from, inputs, cuts=cuts, impl=impl, tolerance=TOLERANCE, layout=layout)


@few_examples
@given(time=st.integers(1, 18), seed=st.integers(0, 99), impl=st.sampled_from(IMPLS))
def test_permuting_the_batch_permutes_the_output(time: int, seed: int, impl: str) -> None:
    inputs, layout = make_inputs(time, dtype=DTYPE), Layout(packed_positions(time, first=1))
    order = torch.randperm(2, generator=torch.Generator().manual_seed(seed))
    y, state = scan(**inputs, layout=layout, impl=impl)
    permuted = {name: z[order] for name, z in inputs.items()}
    y_permuted, state_permuted = scan(**permuted, layout=Layout(layout.positions[order]), impl=impl)
    assert torch.equal(y_permuted, y[order])
    assert torch.equal(state_permuted, state[order])


@few_examples
@given(border=st.integers(1, 17), impl=st.sampled_from(IMPLS))
def test_documents_do_not_see_each_other(border: int, impl: str) -> None:
    inputs, layout = make_inputs(18, dtype=DTYPE), Layout(packed_positions(18, first=2, cuts=(border,)))
    changed = inputs | {"x": inputs["x"].clone(), "initial_state": torch.randn(2, 5, dtype=DTYPE)}
    changed["x"][0, :border] = 1e6
    y, changed_y = (scan(**z, layout=layout, impl=impl)[0] for z in (inputs, changed))
    assert torch.equal(y[0, border:], changed_y[0, border:])
    assert not torch.equal(y[1], changed_y[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_is_checkpointed(impl: str) -> None:
    inputs = make_inputs(6, width=3, dtype=torch.float32)
    leaves = [z.to(DEVICE).requires_grad_() for z in inputs.values()]
    layout = Layout(packed_positions(6, first=1, cuts=(4,)).to(DEVICE))

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor | None]:
        return linear_scan(**dict(zip(inputs, leaves)), layout=layout, output_final_state=True, impl=impl)

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
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["chunked", pytest.param("triton", marks=SLOW)])
def test_registered_ops(impl: str) -> None:
    """Fakes with the shapes and strides of the real outputs, no aliases, nothing written to, gradients registered."""
    inputs = make_inputs(5, batch=1, width=2, dtype=torch.float32)
    x, log_decay, initial = (z.to(DEVICE).requires_grad_() for z in inputs.values())
    positions = packed_positions(5)[:1].to(DEVICE)
    y, state = torch.zeros_like(x), torch.zeros_like(initial)
    plain = [z.detach() for z in (x, state, log_decay, y, initial)]
    if impl == "chunked":
        documents = Layout(positions).starts
        module: Any = chunked
        plain[2] = plain[2].exp()
    else:
        documents = triton._reset_bits(positions)
        module = triton
        plain.append(documents)
    torch.library.opcheck(module.forward, (x, log_decay, initial, documents))
    torch.library.opcheck(module.summary, (x, log_decay, documents))
    torch.library.opcheck(module.backward, tuple(plain))
