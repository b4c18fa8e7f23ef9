"""The Triton kernels of diagonal_lstm and diagonal_gru against the time loop, and as registered ops."""

from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops import Layout
from ops.diagonal_cell import triton as host
from tests.ops.compare import (
    DEVICE,
    LENGTHS,
    SLOW,
    assert_earned,
    assert_earned_bf16,
    assert_equal,
    error,
    evaluate,
    layouts,
    packed_positions,
)
from tests.ops.diagonal_cases import (
    FORMS,
    OPS,
    accumulation,
    both,
    length_of_a_segment,
    make_inputs,
    on_device,
    one_at_first,
)


@pytest.mark.parametrize(
    ("time", "kind", "width"),
    [
        (1, "packed", 64),
        (2, "none", 65),
        pytest.param(17, "continued", 64, marks=SLOW),
        (35, "packed", 60),
        *(
            pytest.param(time, kind, width, marks=SLOW)
            for time in LENGTHS
            for kind, width in (("none", 256), ("packed", 60), ("continued", 100))
            if DEVICE == "cuda" or time <= 100 or kind == "packed"
        ),
    ],
)
@both
def test_fp32_error_is_earned(name: str, time: int, kind: str, width: int) -> None:
    batch = 8 if kind == "none" else 2  # of fewer rows, a few roundings decide whose sum over them errs more
    inputs = make_inputs(name, time, batch=batch, width=width)
    assert_earned(OPS[name], inputs, layout=layouts(time)[kind], impl="triton")


@pytest.mark.parametrize("time", [18, *(pytest.param(time, marks=SLOW) for time in LENGTHS)])
@one_at_first
def test_bf16_error_is_earned(name: str, time: int) -> None:
    assert_earned_bf16(OPS[name], make_inputs(name, time), layout=layouts(time)["packed"], impl="triton")


@pytest.mark.parametrize(
    ("name", "segments"),
    [("gru", 1), *(pytest.param(name, n, marks=SLOW) for name, n in (("lstm", 1), ("lstm", 2), ("gru", 2)))],
)
def test_gradcheck(name: str, segments: int) -> None:
    if accumulation() == torch.float32:
        pytest.skip("compiled kernels have no float64")
    time = 3 if segments == 1 else length_of_a_segment() + 1
    inputs = make_inputs(name, time, batch=1, width=2, spread=1.0)
    layout = Layout(packed_positions(time, first=2, cuts=(2,))[:1])
    op = partial(OPS[name], layout=layout, impl="triton", segments=segments, max_corrections=segments - 1)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return op(**dict(zip(inputs, tensors)))

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, check_undefined_grad=segments == 1)


@settings(max_examples=2, deadline=None)
@given(
    cut=st.integers(1, 6), segments=st.sampled_from([1, 2]), name=st.sampled_from(list(OPS)), start=st.integers(1, 6)
)
def test_splitting_and_carrying_the_state_equals_not_splitting(cut: int, segments: int, name: str, start: int) -> None:
    inputs = on_device(make_inputs(name, 7, batch=1, dtype=accumulation()))
    positions = torch.arange(3, 10).repeat(1, 1).to(DEVICE)
    positions[:, start:] = torch.arange(7 - start)
    op = partial(OPS[name], impl="triton", segments=segments)
    whole, whole_state = op(**inputs, layout=Layout(positions))
    first, state = op(**(inputs | {"gates": inputs["gates"][:, :cut]}), layout=Layout(positions[:, :cut]))
    rest = inputs | {"gates": inputs["gates"][:, cut:], "initial_state": state}
    second, state = op(**rest, layout=Layout(positions[:, cut:]))
    tolerance = 1e-12 if DEVICE == "cpu" else 1e-5
    assert error(torch.cat([first, second], dim=1), whole) < tolerance
    assert error(state, whole_state) < tolerance


@one_at_first
@settings(max_examples=3, deadline=None)
@given(order=st.permutations(range(3)))
def test_permuted_rows_permute_the_output(name: str, order: list[int]) -> None:
    inputs = make_inputs(name, 5, batch=3, dtype=torch.float32)
    permuted = inputs | {k: inputs[k][order] for k in ("gates", "initial_state")}
    y, state = OPS[name](**on_device(inputs), impl="triton")
    permuted_y, permuted_state = OPS[name](**on_device(permuted), impl="triton")
    assert torch.equal(y[order], permuted_y)
    assert torch.equal(state[order], permuted_state)


@both
def test_documents_do_not_see_each_other(name: str) -> None:
    inputs = on_device(make_inputs(name, 6, batch=1, dtype=torch.float32))
    layout = Layout(torch.tensor([[5, 6, 0, 1, 2, 3]], device=DEVICE))
    op = partial(OPS[name], impl="triton", layout=layout)
    gates = inputs["gates"].requires_grad_()
    y, state = op(**inputs)
    (dgates,) = torch.autograd.grad(y[:, 2:].sum() + state.sum(), gates)
    assert not dgates[:, :2].any()
    assert dgates[:, 3:].all()
    changed = inputs | {"gates": torch.cat([-3 * gates[:, :2], gates[:, 2:]], dim=1)}
    assert torch.equal(op(**changed)[0][:, 2:], y[:, 2:])


@one_at_first
def test_strided_inputs(name: str) -> None:
    inputs = make_inputs(name, 5, dtype=torch.float32)
    strided = {
        "gates": inputs["gates"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "a": inputs["a"].T.contiguous().T,
        "initial_state": torch.cat([inputs["initial_state"]] * 2, dim=2)[:, :, :5],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values() if tensor.shape[1] > 1)
    assert_equal(evaluate(OPS[name], inputs | strided, impl="triton"), evaluate(OPS[name], inputs, impl="triton"), 0.0)


@one_at_first
def test_compiles_whole_under_checkpointing_and_autocast(name: str) -> None:
    inputs = make_inputs(name, 3, dtype=torch.float32)
    layout = Layout(torch.tensor([[4, 5, 0], [0, 1, 2]], device=DEVICE))
    op = partial(OPS[name], impl="triton")
    expected = evaluate(op, inputs, layout=layout)

    def recomputed(*, layout: Layout, **leaves: Tensor) -> Any:
        return checkpoint(op, **leaves, layout=layout, use_reentrant=False)

    assert_equal(evaluate(recomputed, inputs, layout=layout), expected, 0.0)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_equal(evaluate(compiled, inputs, layout=layout), expected, 0.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_equal(evaluate(op, inputs, layout=layout), expected, 0.0)


@pytest.mark.parametrize(("name", "dtype"), [pytest.param("lstm", torch.float32, marks=SLOW), ("gru", torch.bfloat16)])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    inputs = on_device(make_inputs(name, 2, dtype=torch.float32, batch=1))
    gates = inputs["gates"].to(dtype).requires_grad_()
    weights = torch.cat([inputs["a"], inputs["c"]]) if name == "lstm" else inputs["a"]
    starts = torch.tensor([[False, True]], device=DEVICE)
    arguments = (gates, weights.requires_grad_(), inputs["initial_state"].requires_grad_(), starts, 1, 1e-6, 3)
    form = FORMS[name]
    torch.library.opcheck(form.forward, arguments)
    gates, weights, initial = (z.detach() for z in arguments[:3])
    y, state, kept, _ = form.forward(gates, weights, initial, *arguments[3:])
    backward = (torch.randn_like(y), torch.randn_like(state), gates, weights, initial, starts, y, kept, 1)
    torch.library.opcheck(form.backward, backward)


def test_float64_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "INTERPRETED", False)
    inputs = on_device(make_inputs("gru", 2))
    with pytest.raises(ValueError, match=r"diagonal_gru: impl 'triton' runs in fp32.*choose impl 'chunked'"):
        OPS["gru"](**inputs, impl="triton")


@triton.jit
def weigh_without_peephole(dgates, state, next_state, acts):
    d_f, d_o, d_z = dgates
    return d_f * state[1], d_o * state[1], d_z * state[1], d_f * state[0], tl.zeros_like(d_o)


@triton.jit
def pull_without_cell(gradient, slopes, weights):
    """The gradient that reaches the cell before a step goes missing."""
    dcell, dh = gradient
    _, by_forget, by_candidate, by_output, by_cell = slopes
    dcell = by_cell * dh + dcell
    d_f, d_o, d_z = dcell * by_forget, dh * by_output, dcell * by_candidate
    dh = weights[0] * d_f + weights[1] * d_o + weights[2] * d_z
    return (tl.zeros_like(dcell), dh), (d_f, d_o, d_z)


@triton.jit
def weigh_without_reset(dgates, state, next_state, acts):
    """The candidate's weight gets its gradient as if the reset gate were open."""
    d_z, d_r, d_c = dgates
    return d_z * state[0], d_r * state[0], d_c * state[0]


@triton.jit
def pull_without_reset_gate(gradient, slopes, weights):
    """What reaches the earlier state through the reset gate's own pre-activation goes missing."""
    (dh,) = gradient
    keep, r, by_update, by_reset, by_candidate = slopes
    d_z, d_c = dh * by_update, dh * by_candidate
    d_reset = d_c * weights[2]
    return (r * d_reset + weights[0] * d_z + keep * dh,), (d_z, d_reset * by_reset, d_c)


MUTANTS = {
    "lstm": {"weigh": weigh_without_peephole, "pull": pull_without_cell},
    "gru": {"weigh": weigh_without_reset, "pull": pull_without_reset_gate},
}


@pytest.mark.parametrize("mutant", [None, "reset", "state", "weigh", "pull"])
@both
def test_what_is_dropped_is_caught(name: str, mutant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, layout = make_inputs(name, 6), Layout(packed_positions(6, first=1, cuts=(3,)))
    form = FORMS[name]
    forward = form.forward

    def dropping(gates: Tensor, weights: Tensor, initial: Tensor, starts: Tensor | None, *options: Any) -> Any:
        starts = None if mutant == "reset" else starts
        return forward(gates, weights, initial * (mutant != "state"), starts, *options)

    monkeypatch.setattr(form, "forward", dropping)
    if mutant in MUTANTS[name]:
        monkeypatch.setattr(form, "cell", form.cell._replace(**{mutant: MUTANTS[name][mutant]}))
    if mutant is None:
        assert_earned(OPS[name], inputs, layout=layout, impl="triton")
        return
    with pytest.raises(AssertionError, match="earned"):
        assert_earned(OPS[name], inputs, layout=layout, impl="triton")
