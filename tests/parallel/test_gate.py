"""A step that is refused changes nothing: for every ZeRO stage and precision, whoever refuses it, and what follows."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.gate import UpdateGate
from parallel.grid import Grid
from tests.parallel.engines import ROWS, Split, engine_of, microbatches
from tests.parallel.mixed import batch, config_of
from tests.parallel.tiny import Batch, learning_rate

KINDS = ("weight", "exp_avg", "exp_avg_sq")
OFFLOADED = {"engine": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}


def state(engine: Any) -> list[Tensor]:
    return [engine.state.gather(name, kind).clone() for name in engine.state.names for kind in KINDS]


def make(grid: Grid, split: Split, **changes: Any) -> Any:
    return engine_of(grid, split, config_of(("rglru", "local_attention")), **changes)


def step(engine: Any, number: int, **options: Any) -> Any:
    input_ids, positions, labels = batch(ROWS)
    rows = Batch((input_ids + number) % 61, labels, positions)
    return engine.step(microbatches(engine, rows), learning_rate(number), **options)


def refuse(grid: Grid, split: Split, **changes: Any) -> dict[str, Any]:
    """Two steps, one refused by the last rank, one that is not finite there, and a third."""
    engine = make(grid, split, **changes)
    asked: list[tuple[float, float]] = []
    first = [tuple(step(engine, number)) for number in range(2)]
    before = state(engine)

    def accept(loss: float, grad_norm: float) -> bool:
        asked.append((loss, grad_norm))
        return grid.rank != grid.world_size - 1

    refused = step(engine, 7, accept=accept)
    after_refusal = all(torch.equal(a, b) for a, b in zip(before, state(engine), strict=True))
    poison = math.inf if grid.rank == grid.world_size - 1 else 0.0
    weight = next(p for p in engine.module.parameters() if p.requires_grad)
    hook = weight.register_hook(lambda grad: grad + poison)
    broken = step(engine, 8, accept=accept)
    hook.remove()
    after_break = all(torch.equal(a, b) for a, b in zip(before, state(engine), strict=True))
    accepted = step(engine, 2, accept=lambda loss, grad_norm: True)
    return {
        "curve": [*first, tuple(accepted)],
        "accepted": (refused.accepted, broken.accepted, accepted.accepted),
        "finite": (math.isfinite(refused.loss + refused.grad_norm), math.isfinite(broken.grad_norm)),
        "asked": asked == [(refused.loss, refused.grad_norm)],
        "unchanged": (after_refusal, after_break),
        "updates": engine.state.num_updates,
    }


def undisturbed(grid: Grid, split: Split, **changes: Any) -> list[tuple]:
    engine = make(grid, split, **changes)
    return [tuple(step(engine, number)) for number in range(3)]


@pytest.mark.parametrize(
    ("split", "changes"),
    [
        (Split(zero=0, pipeline=2), {}),
        (Split(zero=1, tensor=2), {}),
        (Split(zero=2), {"precision": "bf16"}),
        (Split(zero=3), {"parallel": OFFLOADED}),
        *(
            pytest.param(split, changes, marks=pytest.mark.slow)
            for split, changes in (
                *((Split(zero=stage), {"precision": "bf16"}) for stage in (0, 1, 3)),
                *((Split(zero=stage), {"precision": "fp32"}) for stage in (0, 1, 2, 3)),
                (Split(zero=1, pipeline=2), {}),
                (Split(zero=0, tensor=2), {}),
                (Split(zero=1), {"parallel": OFFLOADED}),
            )
        ),
    ],
)
def test_a_refused_step_changes_nothing(ranks: Any, split: Split, changes: dict[str, Any]) -> None:
    expected = ranks(2).run(undisturbed, split=split, **changes)[0]
    for found in ranks(2).run(refuse, split=split, **changes):
        assert found["accepted"] == (False, False, True)
        assert found["finite"] == (True, False)
        assert found["asked"], "once, and not about what is not finite"
        assert found["unchanged"] == (True, True)
        assert found["updates"] == 3
        assert found["curve"] == expected, "to the bit, as if the two steps had not been"


def test_the_question_is_asked_once_a_step() -> None:
    """An optimizer that is called for each part of the state, as ZeRO calls it."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    gate = UpdateGate(optimizer)
    weight.grad = torch.ones(1)
    answers = []
    for answer in (False, True):
        gate.expect(lambda answer=answer: bool(answers.append(answer)) or answer)
        assert not gate.passed
        for _ in range(3):
            optimizer.step()
        assert gate.passed == answer
    assert answers == [False, True]
    assert weight.item() == -2.0
