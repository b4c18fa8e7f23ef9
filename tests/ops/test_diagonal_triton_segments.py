"""How the Triton kernels of diagonal_lstm and diagonal_gru solve: segments, corrections, launches."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ops.diagonal_cell import triton as host
from ops.diagonal_cell.statistics import Statistics
from ops.diagonal_gru.triton import form as gru_form
from tests.ops.cells import newton
from tests.ops.compare import DEVICE, SLOW, assert_equal, evaluate, layouts
from tests.ops.diagonal_cases import (
    CELLS,
    FORMS,
    OPS,
    accumulation,
    both,
    in_segments,
    length_of_a_segment,
    make_inputs,
    on_device,
    one_at_first,
)


@pytest.mark.parametrize(
    ("time", "segments", "kind"),
    [
        (19, 3, "packed"),
        *(
            pytest.param(time, segments, kind, marks=SLOW)
            for i, time in enumerate((16, 17, 65, 100, 257))
            for j, (segments, kind) in enumerate(((2, "none"), (5, "packed"), (16, "continued")))
            if DEVICE == "cuda" or i % 3 == j
        ),
    ],
)
@both
def test_segments_equal_reference(name: str, time: int, segments: int, kind: str) -> None:
    """In float64, with tolerance 1e-13, where kernels are interpreted, else in fp32."""
    inputs = make_inputs(name, time, spread=1.0, dtype=accumulation())
    shot = partial(in_segments, name, segments=segments)
    expected = evaluate(shot, {k: z.double() for k, z in inputs.items()}, layout=layouts(time)[kind], impl="reference")
    found = evaluate(shot, inputs, layout=layouts(time)[kind], impl="triton")
    assert_equal(found, expected, 1e-11 if DEVICE == "cpu" else 1e-5)


@one_at_first
def test_programs_across_rows_and_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of 4 threads holds channels of more than one row and segment, and the last one is not full."""
    monkeypatch.setattr(host, "BLOCK", 4)
    inputs = make_inputs(name, 6, width=3, dtype=accumulation())
    shot = partial(in_segments, name, segments=2)
    expected = evaluate(shot, {k: z.double() for k, z in inputs.items()}, impl="reference")
    assert_equal(evaluate(shot, inputs, impl="triton"), expected, 1e-11 if DEVICE == "cpu" else 1e-5)


@pytest.mark.parametrize(("tolerance", "max_corrections"), [(0.0, 3), (0.0, 0)], ids=["corrected", "left sequential"])
@both
def test_segments_give_the_sequential_loop_to_the_bit(name: str, tolerance: float, max_corrections: int) -> None:
    """S - 1 corrections do, and so do channels that are solved in one piece; weights from N(0, 4)."""
    inputs = on_device(make_inputs(name, 4 * length_of_a_segment(), width=16, spread=2.0, dtype=torch.float32))
    statistics = Statistics()
    options = {"segments": 4, "tolerance": tolerance, "max_corrections": max_corrections, "statistics": statistics}
    y, state = OPS[name](**inputs, impl="triton", **options)
    expected, expected_state = OPS[name](**inputs, impl="triton", segments=1)
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    assert statistics.segments == 4
    assert statistics.residual == 0
    assert statistics.corrections == max_corrections
    assert statistics.sequential_channels == (0 if max_corrections == 3 else 32)


@SLOW
@both
def test_wild_weights_are_solved_where_newton_for_each_token_is_not(name: str) -> None:
    """Weights from N(0, 4): the plain Newton method of ParaRNN stops after three iterations wherever it is."""
    time = 12 * length_of_a_segment()
    inputs = on_device(make_inputs(name, time, batch=1, width=64, spread=2.0, dtype=torch.float32))
    statistics = Statistics()
    expected, _ = OPS[name](**inputs, impl="triton", segments=1)
    found, state = OPS[name](**inputs, impl="triton", segments=3, max_corrections=1, statistics=statistics)
    weights = torch.cat([inputs["a"], inputs["c"]]) if name == "lstm" else inputs["a"]
    published = newton(CELLS[name], inputs["gates"], weights, 3, initial=inputs["initial_state"])
    assert found.isfinite().all()
    assert state.isfinite().all()
    assert (found - expected).abs().max() <= 1e-4  # starts err by 1e-6, which can grow inside a segment
    assert 0 < statistics.sequential_channels < 64
    assert statistics.corrections == 1
    assert statistics.residual <= 1e-6
    assert (published - expected).abs().max() > 1


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@one_at_first
def test_saturated_gates_and_wild_weights_give_no_nan(name: str) -> None:
    """exp overflows for half of the channels; also a start state of a segment, had it not been bounded."""
    inputs = make_inputs(name, 3 * length_of_a_segment(), width=16, spread=2.0, dtype=torch.float32)
    inputs["gates"][..., ::2] *= 1e4
    inputs["gates"][..., ::8] = 0.0
    inputs["initial_state"] *= 100
    results = evaluate(OPS[name], inputs, impl="triton", segments=3)
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert results["output"].abs().max() <= (1 if name == "lstm" else inputs["initial_state"].abs().max())


class ValuesRead(TorchDispatchMode):
    """Counts the values that the host reads from tensors, for which it would wait for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


@one_at_first
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    inputs = on_device(make_inputs(name, 2 * length_of_a_segment(), batch=1, dtype=torch.float32))
    weights = torch.cat([inputs["a"], inputs["c"]]) if name == "lstm" else inputs["a"]
    gates, initial = inputs["gates"], inputs["initial_state"]
    with ValuesRead() as mode:
        y, state, kept, report = FORMS[name]._forward(gates, weights, initial, None, 2, 1e-6, 1)
        FORMS[name]._backward(y, state, gates, weights, initial, None, y, kept, 2)
        assert mode.count == 0
        assert float(report[0]) == 2
        assert mode.count == 1


class Recorder:
    """In place of a kernel: keeps the grid of each launch."""

    def __init__(self) -> None:
        self.grids: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


def test_grid_limits_beyond_65535(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs lie on the first axis of the grid, which takes 2^31 of them."""
    recorder = Recorder()
    for kernel in ("run", "adjoint"):
        monkeypatch.setattr(host, kernel, recorder)
    monkeypatch.setattr(host, "BLOCK", 32)
    gates, weights, initial = torch.zeros(70_000, 1, 3, 32), torch.zeros(3, 32), torch.zeros(70_000, 1, 32)
    y, state, kept, _ = gru_form._forward(gates, weights, initial, None, 1, 1e-6, 3)
    gru_form._backward(y, state, gates, weights, initial, None, y, kept, 1)
    assert recorder.grids == [(70_000,), (70_000,)]


def test_segments_follow_the_size() -> None:
    assert host.default_segments(8, 4096, 2048) == 1
    assert host.default_segments(1, 2048, 256) == 32
    assert host.default_segments(2, 4096, 1024) == 32
    assert host.default_segments(1, 100, 64) == 1
    assert host.default_segments(1, 10**6, 1024) == 64


@given(time=st.integers(1, 5000), segments=st.integers(1, 80))
def test_segments_cover_every_token_once(time: int, segments: int) -> None:
    cut = host.Cut.of(time, segments)
    assert 1 <= cut.segments <= segments
    assert (cut.segments - 1) * cut.length < time <= cut.segments * cut.length
    assert cut.segments == 1 or cut.length % length_of_a_segment() == 0


@pytest.mark.parametrize("kernel", ["carry", "correct"])
def test_a_pass_over_segments_that_does_nothing_is_caught(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `carry` the gradients at segments' ends are whatever is in memory; without `correct` no channel
    converges and the loop is sequential."""
    inputs = make_inputs("gru", 3 * length_of_a_segment(), batch=1, dtype=torch.float32)
    monkeypatch.setattr(host, kernel, Recorder())
    statistics = Statistics()
    shot = partial(OPS["gru"], impl="triton", segments=3, statistics=statistics)
    if kernel == "carry":
        assert evaluate(shot, inputs)["d gates"].isnan().any()
    else:
        expected, _ = OPS["gru"](**on_device(inputs), impl="triton", segments=1)
        assert torch.equal(shot(**on_device(inputs))[0], expected)
        assert statistics.sequential_channels == 5
