"""gated_delta_rule as registered ops, compiled and checkpointed; its properties; its slices; the mapping to fla."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ops import Affine, Layout, gated_delta_rule_summary
from ops.gated_delta_rule import chunked, fla
from ops.gated_delta_rule.decays import layout_masks
from ops.impl import resolve_impl
from tests.ops import test_gated_delta_rule
from tests.ops.compare import DEVICE, SLOW, Inputs, assert_equal, error, evaluate, packed_positions
from tests.ops.test_gated_delta_rule import rule

make_inputs = partial(test_gated_delta_rule.make_inputs, batch=1, width=4)


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [tensor.to(DEVICE).requires_grad_() for tensor in inputs.values()]


LAYOUTS = {"none": None, "packed": Layout(packed_positions(12, first=3, cuts=(7,))[:1].to(DEVICE))}


@pytest.mark.parametrize(
    ("impl", "kind"),
    [pytest.param("chunked", "none", marks=pytest.mark.slow), ("chunked", "packed"), ("triton", "packed")],
)
def test_compiles_whole_and_checkpoints(impl: str, kind: str) -> None:
    leaves = leaves_of(make_inputs(12, dtype=torch.float32))

    def loss(*tensors: Tensor) -> Tensor:
        *inputs, state = tensors
        o, state = rule(*inputs, initial_state=state, layout=LAYOUTS[kind], impl=impl)
        return o.sin().sum() + state.cos().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    checkpointed = partial(checkpoint, loss, use_reentrant=False)
    for form in (compiled, checkpointed):
        for found, gradient in zip(torch.autograd.grad(form(*leaves), leaves), expected):
            torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queries", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_registration_of_chunked(queries: bool) -> None:
    inputs = {n: z.requires_grad_() for n, z in make_inputs(6, group=1).items()}
    chunks = {name: chunked.cut(inputs[name], 4, torch.float64) for name in ("q", "k", "v", "log_decay", "beta")}
    chunks = {name: tensor.detach().requires_grad_() for name, tensor in chunks.items()}
    q = chunks.pop("q")
    masks = layout_masks(Layout(packed_positions(6, first=3, cuts=(5,))[:1]), 4, torch.float64)
    arguments = (q if queries else None, *chunks.values(), inputs["initial_state"], masks)
    torch.library.opcheck(chunked.forward, arguments)
    o, state, *saved = (tensor.detach() for tensor in chunked.forward(*arguments))
    q, k, v, _, beta, *_ = (z if z is None else z.detach() for z in arguments[:5])
    torch.library.opcheck(chunked.backward, (o if queries else None, state, q, k, v, beta, saved))


@SLOW
def test_registration_of_triton() -> None:
    from ops.gated_delta_rule import triton as tier

    leaves = leaves_of(make_inputs(3, group=1, dtype=torch.float32))
    positions = torch.tensor([[1, 0, 1]], device=DEVICE)
    torch.library.opcheck(tier.forward, (*leaves, positions, 0.5))
    with torch.no_grad():
        o, state, *saved = tier.forward(*leaves, positions, 0.5)
        torch.library.opcheck(tier.backward, (o, state, *(z.detach() for z in leaves[:5]), positions, 0.5, saved))


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 69), document=st.integers(0, 69), seed=st.integers(0, 99))
def test_split_anywhere_equals_whole(cut: int, document: int, seed: int) -> None:
    """With a document that starts anywhere, or (at 0) a row that continues one."""
    torch.manual_seed(seed)
    inputs = make_inputs(70)
    layout = Layout(packed_positions(70, first=3, cuts=(document,) if document else ())[:1])
    whole = rule(**inputs, layout=layout)
    state, outputs = inputs.pop("initial_state"), []
    for part in (slice(0, cut), slice(cut, 70)):
        tokens = {name: tensor[:, part] for name, tensor in inputs.items()}
        o, state = rule(**tokens, initial_state=state, layout=Layout(layout.positions[:, part]))
        outputs.append(o)
    assert error(torch.cat(outputs, dim=1), whole[0]) < 1e-12
    assert error(state, whole[1]) < 1e-12


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_permuting_the_batch_permutes_the_output(order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(40, batch=4)
    found = evaluate(rule, {name: tensor[order] for name, tensor in inputs.items()})
    whole = evaluate(rule, inputs)
    for name in ("output", "state 0"):
        assert torch.equal(found[name], whole[name][order])


@settings(max_examples=10, deadline=None)
@given(start=st.integers(1, 39), seed=st.integers(0, 99))
def test_documents_do_not_see_each_other(start: int, seed: int) -> None:
    """What the first document holds changes no bit of the second, and NaN in the state before them reaches neither."""
    torch.manual_seed(seed)
    inputs, layout = make_inputs(40), Layout(packed_positions(40, cuts=(start,))[:1])
    before = rule(**inputs, layout=layout)
    for name in ("q", "k", "v", "log_decay", "beta"):
        inputs[name][:, :start] *= 0.5
    after = rule(**inputs, layout=layout)
    assert torch.equal(before[0][:, start:], after[0][:, start:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0][:, :start], after[0][:, :start])


def by_slices(cuts: tuple[int, ...], layout: Layout | None, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Every slice from the state that the summaries of the earlier ones, composed, make of the first."""
    time, start = inputs["q"].shape[1], inputs.pop("initial_state")
    before: Affine | None = None
    outputs = []
    for part in (slice(a, b) for a, b in zip((0, *cuts), (*cuts, time))):
        tokens = {name: tensor[:, part] for name, tensor in inputs.items()}
        here = None if layout is None else Layout(layout.positions[:, part])
        o, _ = rule(**tokens, layout=here, initial_state=start if before is None else before(start))
        outputs.append(o)
        summary = gated_delta_rule_summary(*(tokens[n] for n in ("k", "v", "log_decay", "beta")), layout=here)
        before = summary if before is None else before.then(summary)
    assert before is not None
    return torch.cat(outputs, dim=1), before(start)


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("cuts", [(37,), (1, 64), (16, 33, 64, 90)])
def test_summaries_compose(cuts: tuple[int, ...], kind: str) -> None:
    layout = None if kind == "none" else Layout(packed_positions(100, first=7 * (kind == "continued")))
    inputs = make_inputs(100, batch=2)
    expected = evaluate(rule, inputs, layout=layout, impl="reference")
    assert_equal(evaluate(partial(by_slices, cuts), inputs, layout=layout), expected, 1e-12)


def test_a_summary_without_its_resets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from ops.gated_delta_rule import summary

    monkeypatch.setattr(summary, "layout_masks", lambda *_: [])
    with pytest.raises(AssertionError):
        test_summaries_compose((37,), "packed")


def test_gradcheck_of_the_summary() -> None:
    """Whose recurrence runs without queries: another path through the backward."""
    k, v, log_decay, beta = (z.requires_grad_() for z in list(make_inputs(6).values())[1:5])
    layout = Layout(packed_positions(6, first=2, cuts=(2,))[:1])
    for here in (None, layout):
        assert torch.autograd.gradcheck(
            lambda *z, here=here: tuple(gated_delta_rule_summary(*z, layout=here)),
            (k, v, log_decay, beta),
            fast_mode=True,
        )


@pytest.mark.parametrize("slices", [2, 5])
def test_summary_in_fp32(slices: int) -> None:
    """The error of the composed state is that of the state of one run."""
    inputs = make_inputs(100, dtype=torch.float32)
    cuts = tuple(range(20, 100, 20) if slices == 5 else (50,))
    exact = evaluate(rule, {name: tensor.double() for name, tensor in inputs.items()}, impl="reference")
    assert_equal(evaluate(partial(by_slices, cuts), inputs, layout=None), exact, 1e-6)


def test_summary_of_bf16_and_bad_shapes() -> None:
    inputs = make_inputs(9, dtype=torch.bfloat16)
    k, v, log_decay, beta = (inputs[name] for name in ("k", "v", "log_decay", "beta"))
    transition, offset = gated_delta_rule_summary(k, v, log_decay, beta)
    assert transition.dtype == offset.dtype == torch.float32
    assert (transition.shape, offset.shape) == ((1, 2, 4, 4), (1, 2, 4, 6))
    with pytest.raises(ValueError, match=r"gated_delta_rule_summary: beta has shape .*\[B, T, HV\] = \[1, 9, 2\]"):
        gated_delta_rule_summary(k, v, log_decay, beta[:, :3])
    with pytest.raises(ValueError, match="HV = 2 heads; must be a multiple of k's H = 3"):
        gated_delta_rule_summary(k.expand(1, 9, 3, 4), v, log_decay, beta)


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
def test_fla_gets_our_arguments(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping alone, on the CPU: in its kernels' place a loop over flash-linear-attention's own naive form."""
    peer = pytest.importorskip("fla.ops.gated_delta_rule")
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule

    def kernels(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        borders, states = options.pop("cu_seqlens", None), options.pop("initial_state")
        q, k = (z.repeat_interleave(v.shape[2] // q.shape[2], dim=2) for z in (q, k))
        if borders is None:
            return naive(q, k, v, beta, g, initial_state=states, **options)
        outputs = []
        for i, (a, b) in enumerate(zip(borders.tolist(), borders.tolist()[1:])):
            document = (z[:, a:b] for z in (q, k, v, beta, g))
            outputs.append(naive(*document, initial_state=None if states is None else states[i : i + 1], **options))
        return tuple(torch.cat(z, dim=dim) for dim, z in zip((1, 0), zip(*outputs)))

    def mapped(initial_state: Tensor | None = None, layout: Layout | None = None, **inputs: Tensor) -> Any:
        return fla.gated_delta_rule(**inputs, scale=0.7, layout=layout, initial_state=initial_state)

    monkeypatch.setattr(peer, "chunk_gated_delta_rule", kernels)
    layout = None if kind == "none" else Layout(packed_positions(36, first=7 * (kind == "continued"), cuts=(5, 6, 20)))
    inputs = make_inputs(36, batch=2, dtype=torch.float32)
    for given_inputs in (inputs, {n: z for n, z in inputs.items() if n != "initial_state"}):
        expected = evaluate(rule, given_inputs, layout=layout, scale=0.7, impl="reference")
        assert_equal(evaluate(mapped, given_inputs, layout=layout), expected, 2e-6)
    with pytest.raises(ValueError, match="float64 inputs; 'fla' computes in fp32: choose 'chunked'"):
        mapped(**{name: tensor.double() for name, tensor in inputs.items()})


def test_fla_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="'fla' cannot run on device 'cpu'"):
        resolve_impl("gated_delta_rule", "fla", "cpu")
