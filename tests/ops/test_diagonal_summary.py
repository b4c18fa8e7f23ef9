"""diagonal_lstm_summary and diagonal_gru_summary: sequence parallelism of the nonlinear recurrences in one process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import Affine, Layout, diagonal_gru, diagonal_gru_summary, diagonal_lstm, diagonal_lstm_summary
from tests.ops.compare import Inputs, assert_equal, evaluate, packed_positions
from tests.ops.largest import LargestTensor

TIME = 150
BORDERS = {2: [0, 64, TIME], 3: [0, 1, 97, TIME], 5: [0, 32, 33, 64, 120, TIME]}
Op = Callable[..., Any]
both = pytest.mark.parametrize(
    ("op", "summary"),
    [(diagonal_lstm, diagonal_lstm_summary), (diagonal_gru, diagonal_gru_summary)],
    ids=["lstm", "gru"],
)


def make_inputs(op: Op, *, time: int = TIME, width: int = 3, spread: float = 0.5) -> Inputs:
    inputs = {
        "gates": torch.randn(2, time, 3, width, dtype=torch.float64),
        "a": spread * torch.randn(3, width, dtype=torch.float64),
    }
    if op is diagonal_lstm:
        inputs["c"] = spread * torch.randn(2, width, dtype=torch.float64)
    states = 2 if op is diagonal_lstm else 1
    return inputs | {"initial_state": torch.randn(2, states, width, dtype=torch.float64)}


def in_slices(
    op: Op,
    summary: Op,
    borders: list[int],
    *,
    tolerance: float = 1e-13,
    repeated: list[int] | None = None,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """What ranks that hold a slice each would do: guess, run slices, compose, correct, until no guess moves."""
    layout, initial, gates = inputs.pop("layout"), inputs.pop("initial_state"), inputs.pop("gates")
    slices = [slice(*border) for border in zip(borders, borders[1:])]
    layouts = [None if layout is None else Layout(layout.positions[:, tokens]) for tokens in slices]
    parts = [partial(summary, gates[:, tokens], **inputs, layout=here) for tokens, here in zip(slices, layouts)]
    guesses = [initial, *(torch.zeros_like(initial) for _ in slices[1:])]
    repetitions, moved = 0, float("inf")
    while moved > tolerance:
        maps = [part(initial_state=guess.detach()) for part, guess in zip(parts, guesses)]
        starts, composed = [initial], maps[0]
        for one in maps[1:]:
            starts.append(composed(initial))
            composed = composed.then(one)
        moved = max(float((start - guess).detach().abs().max()) for start, guess in zip(starts, guesses))
        guesses, repetitions = starts, repetitions + 1
        assert repetitions <= len(slices) + 1, "k repetitions give the first k + 1 slices their start states"
    if repeated is not None:
        repeated.append(repetitions)
    outputs = []
    for tokens, here, start in zip(slices, layouts, starts):
        output, last = op(gates[:, tokens], **inputs, layout=here, initial_state=start, output_final_state=True)
        outputs.append(output)
    return torch.cat(outputs, dim=1), last


@both
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_slices_equal_the_whole(op: Op, summary: Op, count: int, packed: bool) -> None:
    """Outputs, last state and every gradient; documents start at slice borders, right after them and inside."""
    inputs, layout = make_inputs(op), Layout(packed_positions(TIME)) if packed else None
    repeated: list[int] = []
    sliced = partial(in_slices, op, summary, BORDERS[count], repeated=repeated)
    expected = evaluate(partial(op, output_final_state=True), inputs, layout=layout, impl="reference")
    assert_equal(evaluate(lambda impl, **z: sliced(**z), inputs, layout=layout, impl=""), expected, 1e-11)
    assert repeated[0] <= 4


@both
def test_wild_weights_converge_too(op: Op, summary: Op) -> None:
    inputs = make_inputs(op, spread=2.0)
    expected = evaluate(partial(op, output_final_state=True), inputs, layout=None, impl="reference")
    sliced = partial(in_slices, op, summary, BORDERS[5])
    assert_equal(evaluate(lambda impl, **z: sliced(**z), inputs, layout=None, impl=""), expected, 1e-8)


@both
@pytest.mark.parametrize("dropped", ["transition", "offset"])
def test_a_dropped_part_is_caught(op: Op, summary: Op, dropped: str) -> None:
    """Without its transition the states converge, as repeated runs do, but gradients stop at a slice's border."""
    inputs = make_inputs(op, time=40)
    inputs["gates"][:, :, 0] += 4 if op is diagonal_lstm else -4  # memories of fifty tokens
    expected = evaluate(partial(op, output_final_state=True), inputs, layout=None, impl="reference")

    def part(*args: Any, **kwargs: Any) -> Affine:
        whole = summary(*args, **kwargs)
        end = whole(kwargs["initial_state"])
        return (
            Affine(torch.zeros_like(whole.transition), end) if dropped == "transition" else whole._replace(offset=end)
        )

    sliced = partial(in_slices, op, part, [0, 8, 16, 24, 40], tolerance=1e-6)
    with pytest.raises(AssertionError):
        assert_equal(evaluate(lambda impl, **z: sliced(**z), inputs, layout=None, impl=""), expected, 1e-4)


@both
def test_transition_is_the_jacobian(op: Op, summary: Op) -> None:
    """By autograd through the time loop, around a state that is not zero; 0 in the row where a document starts."""
    inputs = make_inputs(op, time=12)
    layout = Layout(packed_positions(12, first=1, cuts=(5,)))
    others = {name: z for name, z in inputs.items() if name != "initial_state"}

    def end(state: Tensor) -> Tensor:
        return op(**others, layout=layout, initial_state=state, output_final_state=True, impl="reference")[1]

    state = inputs["initial_state"]
    jacobian = torch.autograd.functional.jacobian(end, state)
    affine = summary(**inputs, layout=layout)
    assert_equal(
        {"transition": affine.transition, "end": affine(state)},
        {"transition": torch.einsum("bidbjd->bijd", jacobian), "end": end(state)},
        1e-13,
    )
    assert not affine.transition[0].any()
    assert affine.transition[1].all()


@both
def test_gradcheck(op: Op, summary: Op) -> None:
    """Of the state after the slice, at the guess that it was linearised around."""
    inputs, layout = make_inputs(op, time=7, width=2), Layout(packed_positions(7, first=2, cuts=(4,)))
    guess = inputs.pop("initial_state")

    def end(*leaves: Tensor) -> Tensor:
        return summary(**dict(zip(inputs, leaves)), layout=layout, initial_state=guess)(guess)

    assert torch.autograd.gradcheck(end, [z.requires_grad_() for z in inputs.values()])


@both
def test_long_slices_are_read_in_pieces(op: Op, summary: Op) -> None:
    """What is held is less than what is read, and the pieces, one of them a single token, add up."""
    inputs = {name: z.float() for name, z in make_inputs(op, time=1025, width=8).items()}
    inputs["gates"][:, :, 0] += 8 if op is diagonal_lstm else -8  # so that the last state still knows of the first
    with LargestTensor() as largest:
        affine = summary(**inputs)
    assert largest.numel < inputs["gates"].numel()
    assert affine.transition.abs().max() > 1e-2
    first = summary(**inputs | {"gates": inputs["gates"][:, :700]})
    end = first(inputs["initial_state"])
    second = summary(**inputs | {"gates": inputs["gates"][:, 700:], "initial_state": end})
    composed = first.then(second)
    assert_equal({"transition": affine.transition}, {"transition": composed.transition}, 1e-4)
    assert_equal({"end": affine(inputs["initial_state"])}, {"end": composed(inputs["initial_state"])}, 1e-5)


@both
def test_summary_refuses_wrong_shapes(op: Op, summary: Op) -> None:
    inputs = make_inputs(op)
    with pytest.raises(ValueError, match=r"_summary: a has shape \[3, 4\]; must be \[3, D\]"):
        summary(**inputs | {"a": torch.zeros(3, 4)})
