"""Goodput under failures: the closed form against a simulation, and the best interval against a search."""

import dataclasses

import pytest

from parallel.plan.goodput import Job, at_best, best_interval, goodput, simulated

HOUR = 3600.0
JOBS = {
    "512 GPUs": Job(gpus=512, interval=HOUR, wait=2, write=60, restart=600),
    "10,000 GPUs": Job(gpus=10_000, interval=600, wait=5, write=120, restart=900),
    "failures every hour": Job(gpus=50_000, interval=1200, wait=60, write=300, restart=300),
    "synchronous": Job(gpus=10_000, interval=1800, wait=120, write=0, restart=600),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_closed_form_is_what_simulated_failures_leave(name: str) -> None:
    job = JOBS[name]
    lost, found = 1 - simulated(job, failures=40_000, seed=0), 1 - goodput(job)
    assert found == pytest.approx(lost, rel=0.05)


def test_each_cost_counts() -> None:
    """A form that left one of them out would not see it change; the simulation does by as much."""
    job = JOBS["failures every hour"]
    for change in ({"wait": 120.0}, {"write": 900.0}, {"restart": 900.0}, {"gpus": 100_000}, {"interval": 2400.0}):
        worse = dataclasses.replace(job, **change)
        less = goodput(job) - goodput(worse)
        assert less > 0.01, change
        drawn = simulated(job, failures=40_000, seed=1) - simulated(worse, failures=40_000, seed=1)
        assert less == pytest.approx(drawn, abs=0.01), change


@pytest.mark.parametrize("name", JOBS)
def test_no_other_interval_is_better(name: str) -> None:
    best = at_best(JOBS[name])
    for factor in (0.5, 0.7, 1.4, 2.0):
        interval = max(factor * best.interval, best.write, 1.0)
        assert goodput(dataclasses.replace(best, interval=interval)) <= goodput(best) + 1e-4, factor


def test_the_best_interval_is_youngs_where_saving_is_cheap() -> None:
    job = Job(gpus=1000, interval=HOUR, wait=1, write=0, restart=0)
    assert best_interval(job) == pytest.approx((2 * job.wait * job.between_failures) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": 0}, "gpus: 0; must be positive"),
        ({"wait": -1.0}, "wait: -1.0; must not be negative"),
        ({"write": 2 * HOUR}, r"write: 7200.0; must be at most the interval \(3600.0\)"),
    ],
)
def test_what_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(JOBS["512 GPUs"], **change)
