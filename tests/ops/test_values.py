"""What values do to the recurrences: legal ones, however extreme, give finite and right results; illegal ones, which
nobody looks at unless `checked_values` is on, neither crash nor hang anything, nor reach the rows beside theirs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import ops
from ops import Layout
from ops.impl import IMPLEMENTATIONS
from tests.ops.compare import SLOW, Inputs, evaluate, packed_positions, runnable

# exp is 1, not quite 1, the smallest normal number, the smallest one and 0.
LOG_DECAYS = torch.tensor([0.0, -1e-30, -0.1, -20.0, -87.3, -103.9, -1e4, -3e38, -torch.inf])
SIZES = torch.tensor([0.0, 1e-6, 1.0, 1e4])
WIDTH = 4


def scan(time: int, values: torch.Generator) -> Inputs:
    return {"x": numbers(values, 2, time, WIDTH), "log_decay": chosen(LOG_DECAYS, values, 2, time, WIDTH)}


def linear_attention(time: int, values: torch.Generator) -> Inputs:
    q, k, v = (numbers(values, 2, time, 2, WIDTH) for _ in range(3))
    return {"q": q, "k": k, "v": v, "log_decay": chosen(LOG_DECAYS, values, 2, time, 2, WIDTH)}


def delta_rule(time: int, values: torch.Generator) -> Inputs:
    """Keys of any length, and beta |k|^2 of 0, 1 and 2."""
    q, k, v = (numbers(values, 2, time, 2, WIDTH) for _ in range(3))
    k = normalize(torch.randn(k.shape, generator=values), dim=-1) * 10 ** (
        4 * torch.rand(2, time, 2, 1, generator=values) - 2
    )
    beta = chosen(torch.tensor([0.0, 1.0, 2.0]), values, 2, time, 2) * (1 - 1e-6) / k.square().sum(-1)
    return {"q": q, "k": k, "v": v, "log_decay": chosen(LOG_DECAYS, values, 2, time, 2), "beta": beta}


def chosen(choices: Tensor, values: torch.Generator, *shape: int) -> Tensor:
    return choices[torch.randint(0, len(choices), shape, generator=values)]


def numbers(values: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=values) * chosen(SIZES, values, *shape)


RECURRENCES = {
    "linear_scan": (partial(ops.linear_scan, output_final_state=True), scan),
    "gated_linear_attention": (partial(ops.gated_linear_attention, output_final_state=True), linear_attention),
    "gated_delta_rule": (partial(ops.gated_delta_rule, output_final_state=True), delta_rule),
}


@pytest.mark.filterwarnings("ignore:.*overflow encountered")
@pytest.mark.parametrize("impl", ["chunked", pytest.param("triton", marks=SLOW)])
@pytest.mark.parametrize("op", RECURRENCES)
@settings(max_examples=10, deadline=None)
@given(time=st.integers(1, 40), documents=st.sets(st.integers(1, 39), max_size=3), seed=st.integers(0, 999))
def test_any_legal_values(op: str, impl: str, time: int, documents: set[int], seed: int) -> None:
    """Within 1e-4 of the time loop in float64, and of what fp32 cannot hold."""
    function, draw = RECURRENCES[op]
    inputs = draw(time, torch.Generator().manual_seed(seed))
    layout = Layout(packed_positions(time, first=seed % 2, cuts=sorted(documents)))
    exact = evaluate(function, {n: z.double() for n, z in inputs.items()}, layout=layout, impl="reference")
    found = evaluate(function, inputs, layout=layout, impl=impl)
    for name, right in exact.items():
        assert found[name].isfinite().all(), name
        assert (found[name] - right).norm() <= 1e-4 * right.norm() + 1e-30, name


POSITIONS = torch.tensor([-3, -1, 0, 0, 7, 7, 3, 2**40, -(2**40), 1, 2, 99])


def ordinary(op: str, time: int) -> Inputs:
    """Two rows of legal inputs of an op that reads positions."""
    decays, unit = -torch.rand(2, time, 2, WIDTH), normalize(torch.randn(2, time, 2, WIDTH), dim=-1)
    gates, weights = torch.randn(2, time, 3, WIDTH), torch.randn(3, WIDTH)
    return {
        "attention": {"q": unit, "k": unit, "v": unit},
        "causal_conv1d": {"x": decays[:, :, 0], "weight": weights.T},
        "diagonal_gru": {"gates": gates, "a": weights},
        "diagonal_lstm": {"gates": gates, "a": weights, "c": weights[:2]},
        "gated_delta_rule": {"q": unit, "k": unit, "v": unit, "log_decay": decays[..., 0], "beta": -decays[..., 1]},
        "gated_linear_attention": {"q": unit, "k": unit, "v": unit, "log_decay": decays},
        "linear_scan": {"x": unit[:, :, 0], "log_decay": decays[:, :, 0]},
        "local_attention": {"q": unit, "k": unit, "v": unit},
        "rotary": {"x": unit},
    }[op]


def call(op: str, *, layout: Layout, impl: str, **inputs: Tensor) -> tuple[Tensor, Any]:
    if op == "rotary":
        return ops.rotary(**inputs, positions=layout.positions, impl=impl), None
    options = {"window": 3} if op == "local_attention" else {}
    return getattr(ops, op)(**inputs, **options, layout=layout, output_final_state=True, impl=impl)


def growing(inputs: Inputs) -> None:
    inputs["log_decay"][1] = 3.0


def too_long(inputs: Inputs) -> None:
    inputs["k"][1], inputs["beta"][1] = 30.0, 2.0


def no_numbers(inputs: Inputs) -> None:
    inputs["log_decay"][1] = torch.nan


Spoil = Callable[[Inputs], None]
ILLEGAL: dict[str, tuple[Spoil | None, ...]] = {
    op: (None, *((growing, no_numbers) if op in RECURRENCES else ()), *((too_long,) if "delta" in op else ()))
    for op in IMPLEMENTATIONS
    if op not in ("linear_cross_entropy", "rms_norm")
}


@pytest.mark.filterwarnings("ignore:.*encountered")
@pytest.mark.parametrize(
    ("op", "impl", "spoil"),
    [
        pytest.param(op, impl, spoil, marks=SLOW if impl == "triton" else ())
        for op in ILLEGAL
        for impl in ("reference", *runnable(op))
        for spoil in ILLEGAL[op]
    ],
    ids=lambda z: z.__name__ if callable(z) else "positions" if z is None else z,
)
def test_illegal_values_stay_in_their_row(
    op: str, impl: str, spoil: Spoil | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of two rows: positions that are negative and skip, growing states, keys too long, and NaN."""
    monkeypatch.setattr("ops.layout.check_positions", lambda positions: None)  # as on a GPU, where none are read
    time = len(POSITIONS) if op in RECURRENCES else 6
    inputs, layout = ordinary(op, time), Layout(torch.arange(time).repeat(2, 1))
    inputs = {name: z.clone() for name, z in inputs.items()}
    expected = evaluate(partial(call, op), inputs, layout=layout, impl=impl)
    if spoil is None:
        layout = Layout(torch.stack([torch.arange(time), POSITIONS[:time]]))
    else:
        spoil(inputs)
    found = evaluate(partial(call, op), inputs, layout=layout, impl=impl)
    for name, right in expected.items():
        assert found[name].shape == right.shape
        if len(right) == 2 and name not in ("d a", "d c", "d weight"):
            torch.testing.assert_close(found[name][0], right[0], rtol=1e-6, atol=1e-6)
