"""Learning rates at the points that define a schedule."""

import math

import pytest

from training.config import ScheduleConfig
from training.schedule import learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [learning_rate(step, peak=2.0, total_steps=steps, schedule=schedule) for step in range(steps)]


def test_warm_up_is_linear_and_never_zero() -> None:
    assert rates(10, warmup_steps=4)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_cosine_falls_to_the_final_fraction() -> None:
    values = rates(104, warmup_steps=4, final_fraction=0.1)
    assert values[-1] == pytest.approx(0.2)
    assert values[53] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert all(later < earlier for earlier, later in zip(values[4:], values[5:]))


def test_wsd_holds_then_falls() -> None:
    values = rates(100, kind="wsd", warmup_steps=10, decay_steps=20, final_fraction=0.0)
    assert values[9:80] == [2.0] * 71
    assert values[84] == pytest.approx(2.0 * (1.0 - math.sqrt(5 / 20)))
    assert values[-1] == pytest.approx(0.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "wsd"},
        {"decay_steps": 5},
        {"final_fraction": 1.5},
        {"warmup_steps": -1},
        {"kind": "wsd", "decay_steps": 0},
    ],
)
def test_impossible_schedules_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings.keys() - {"kind"}), "decay_steps")):
        ScheduleConfig(**settings)
