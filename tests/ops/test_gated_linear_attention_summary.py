"""gated_linear_attention's summary of a slice, and how it asks flash-linear-attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ops import Affine, Layout, gated_linear_attention, gated_linear_attention_summary
from ops.gated_linear_attention import fla, reference
from tests.ops.compare import assert_equal, error, evaluate, extreme_decays, layouts
from tests.ops.largest import LargestTensor
from tests.ops.test_gated_linear_attention import gla, make_inputs

TIME = 100
BORDERS = {2: [0, 33, TIME], 3: [0, 1, 64, TIME], 5: [0, 16, 17, 40, 96, TIME]}


def in_slices(*, borders: list[int], layout: Layout | None, initial_state: Tensor, **tensors: Tensor) -> Any:
    """What ranks that hold a slice each would do: summarise, compose, and run from the composed state."""
    before: Affine | None = None
    outputs, state = [], initial_state
    for start, end in zip(borders, borders[1:]):
        part = {name: tensor[:, start:end] for name, tensor in tensors.items()}
        here = None if layout is None else Layout(layout.positions[:, start:end])
        state = initial_state if before is None else before(initial_state)
        o, last = gla(**part, layout=here, initial_state=state)
        outputs.append(o)
        own = gated_linear_attention_summary(part["k"], part["v"], part["log_decay"], layout=here)
        before = own if before is None else before.then(own)
        assert error(before(initial_state), last) <= (1e-6 if o.dtype == torch.float32 else 1e-13)
    return torch.cat(outputs, dim=1), before(initial_state)


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("slices", BORDERS)
def test_slices_from_composed_states_equal_the_whole(slices: int, kind: str) -> None:
    inputs, layout = make_inputs(TIME), layouts(TIME)[kind]

    def sliced(**arguments: Any) -> Any:
        return in_slices(borders=BORDERS[slices], **arguments)

    assert_equal(evaluate(sliced, inputs, layout=layout), evaluate(gla, inputs, layout=layout), 1e-13)


def test_extreme_decays_and_fp32() -> None:
    inputs = make_inputs(TIME, keys=30, dtype=torch.float32)
    inputs["log_decay"] = extreme_decays(*inputs["log_decay"].shape)
    for layout in layouts(TIME).values():

        def sliced(layout: Layout | None = layout, **arguments: Any) -> Any:
            return in_slices(borders=BORDERS[3], layout=layout, **arguments)

        found = evaluate(sliced, inputs, layout=layout)
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert_equal(found, evaluate(gla, inputs, layout=layout, impl="reference"), 1e-6)


@pytest.mark.parametrize("lost", ["transition", "offset"])
def test_a_summary_across_documents_is_caught(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    right = gated_linear_attention_summary

    def wrong(*tensors: Tensor, layout: Layout) -> Affine:
        return right(*tensors, layout=layout)._replace(**{lost: getattr(right(*tensors), lost)})

    monkeypatch.setitem(globals(), "gated_linear_attention_summary", wrong)
    with pytest.raises(AssertionError):
        in_slices(borders=[0, 33, 70], layout=layouts(70)["packed"], **make_inputs(70))


def test_the_states_of_single_tokens_are_never_made() -> None:
    k, v = torch.randn(1, 512, 2, 16), torch.randn(1, 512, 2, 24)
    with LargestTensor() as largest:
        gated_linear_attention_summary(k, v, -k.abs())
    assert largest.numel == v.numel()


def test_of_bf16_and_bad_shapes() -> None:
    k, v = torch.randn(1, 5, 2, 3).bfloat16(), torch.randn(1, 5, 2, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        transition, offset = gated_linear_attention_summary(k, v, -k.float().abs())
    assert transition.dtype == offset.dtype == torch.float32
    exact = gated_linear_attention_summary(k.double(), v.double(), -k.double().abs())
    assert error(offset, exact.offset) < 1e-6
    with pytest.raises(ValueError, match=r"gated_linear_attention_summary: v has shape \[1, 4, 2, 4\]"):
        gated_linear_attention_summary(k, v[:, 1:], -k.abs())


@pytest.mark.filterwarnings("ignore:Triton is not supported")
@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("time", [1, 40])
def test_fla_gets_our_arguments(monkeypatch: pytest.MonkeyPatch, time: int, kind: str) -> None:
    """The mapping alone, on the CPU, onto a time loop; its kernels run on a GPU."""
    import fla.ops.gla as theirs

    def imitation(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        scale: float,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sequence by sequence, with states [N, H, K, V]."""
        assert output_final_state
        if cu_seqlens is None:
            return reference.gated_linear_attention(q, k, v, g, scale, None, initial_state)
        outputs, states = [], []
        for i, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])):
            state = None if initial_state is None else initial_state[i : i + 1]
            parts = (z[:, start:end] for z in (q, k, v, g))
            o, state = reference.gated_linear_attention(*parts, scale, None, state)
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    monkeypatch.setattr(theirs, "chunk_gla", imitation)

    def ours(*, layout: Layout | None, initial_state: Tensor | None = None, **tensors: Tensor) -> Any:
        return fla.gated_linear_attention(**tensors, scale=0.3, layout=layout, initial_state=initial_state)

    inputs, layout = make_inputs(time, dtype=torch.float32), layouts(time)[kind]
    for names in (inputs, [name for name in inputs if name != "initial_state"]):
        some = {name: inputs[name] for name in names}
        expected = evaluate(gla, some, layout=layout, impl="reference", scale=0.3)
        assert_equal(evaluate(ours, some, layout=layout), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_fla_refuses() -> None:
    wide, q = torch.zeros(1, 2, 1, 513), torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"K = 513 features; 'fla' takes at most 512: choose 'chunked'"):
        fla.gated_linear_attention(wide, wide, wide, wide, 1.0, None, None)
    with pytest.raises(ValueError, match="float64 inputs; 'fla' computes in fp32: choose 'chunked'"):
        fla.gated_linear_attention(q, q, q, q, 1.0, None, None)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'fla' cannot run on device 'cpu': it needs a GPU"):
            gated_linear_attention(q, q, q, q, impl="fla")
