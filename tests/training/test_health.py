"""Steps that would harm the weights."""

import json
import math
import random

import pytest

from training.health import Health, HealthConfig


def healthy(health: Health, steps: int, seed: int = 0) -> None:
    draw = random.Random(seed)
    for step in range(steps):
        figures = 4.0 - 0.001 * step + 0.02 * draw.gauss(0, 1), math.exp(0.2 * draw.gauss(0, 1))
        assert health.problem(*figures) is None
        assert health.accepts(*figures)
        health.made(*figures)


@pytest.mark.parametrize("reaction", ["log", "skip", "rollback"])
def test_a_spike_is_seen_and_answered_as_configured(reaction: str) -> None:
    health = Health(HealthConfig(on_spike=reaction, spike_window=64))
    healthy(health, 300)
    for figures, what in [((4.8, 1.0), "loss"), ((3.8, 30.0), "gradient norm")]:
        assert health.problem(*figures).startswith(f"spike of the {what}: loss {figures[0]:.4g}")
        assert health.accepts(*figures) == (reaction == "log")
    assert health.not_made(4.8, 1.0, (0, 7)) == (reaction == "rollback")
    assert health.problem(1.0, 1e-3) is None, "what falls is no spike"


def test_earlier_spikes_do_not_hide_later_ones() -> None:
    health = Health(HealthConfig(spike_window=32))
    healthy(health, 64)
    for _ in range(10):
        health.made(9.0, 50.0)
    assert health.problem(9.0, 1.0) is not None


def test_nothing_is_a_spike_until_enough_is_known() -> None:
    health = Health(HealthConfig(on_spike="skip", spike_window=64))
    healthy(health, 15)
    assert health.problem(40.0, 1.0) is None
    health.made(4.0, 1.0)
    assert health.problem(40.0, 1.0) is not None


def test_a_constant_loss_is_not_judged_by_its_last_digits() -> None:
    health = Health(HealthConfig(on_spike="skip", spike_window=16))
    for _ in range(16):
        health.made(2.0, 1.0)
    assert health.accepts(2.1, 1.3)
    assert not health.accepts(2.3, 1.0)
    assert not health.accepts(2.0, 2.0)


@pytest.mark.parametrize("figures", [(math.nan, 1.0), (4.0, math.inf), (4.0, math.nan), (-math.inf, 1.0)])
@pytest.mark.parametrize("reaction", ["log", "skip", "rollback"])
def test_what_is_not_finite_is_left_out_and_after_several_undone(figures: tuple[float, float], reaction: str) -> None:
    health = Health(HealthConfig(on_spike=reaction, max_skipped=3, max_rollbacks=1))
    assert health.problem(*figures).startswith("not finite: loss")
    assert not health.accepts(*figures)
    assert [health.not_made(*figures, (8 * i, 8 * i + 7)) for i in range(3)] == [False, False, True]
    assert health.left_out == ((0, 7), (8, 15), (16, 23))
    assert health.may_go_back
    health.went_back({})
    assert not health.left_out
    assert not health.may_go_back
    health.made(4.0, 1.0)
    assert not health.not_made(*figures, (24, 31)), "only those in a row count"


def test_its_state_goes_through_json_to_the_same_judgements() -> None:
    config = HealthConfig(on_spike="skip", spike_window=32)
    health = Health(config)
    healthy(health, 40)
    health.not_made(math.nan, 1.0, (0, 7))
    again = Health(config, json.loads(json.dumps(health.state())))
    assert again.state() == health.state()
    for loss in (3.9, 4.1, 4.2, 4.3, 4.5):
        assert again.problem(loss, 1.0) == health.problem(loss, 1.0)


def test_going_back_forgets_what_came_after_and_counts() -> None:
    config = HealthConfig(spike_window=32, max_rollbacks=2)
    health = Health(config)
    healthy(health, 20)
    saved = health.state()
    healthy(health, 20, seed=1)
    health.went_back(saved)
    assert health.state() == saved | {"rollbacks": 1}
    assert Health(config, health.state()).rollbacks == 1
    health.went_back(saved)
    assert health.rollbacks == 2, "what the checkpoint says of earlier ones does not undo the count"
    assert not health.may_go_back


@pytest.mark.parametrize(
    ("key", "value", "requirement"),
    [
        ("spike_window", 3, "must be at least 4"),
        ("max_skipped", 0, "must be at least 1"),
        ("skip_around", -1, "must be at least 0"),
        ("max_rollbacks", -1, "must be at least 0"),
        ("spike_score", 0.0, "must be more than 0"),
        ("hang_factor", 1.0, "must be more than 1"),
        ("hang_minutes", 0.0, "must be more than 0"),
        ("slow_factor", 0.5, "must be more than 1"),
    ],
)
def test_impossible_limits_are_refused(key: str, value: float, requirement: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: {value}; {requirement}"):
        HealthConfig(**{key: value})
