"""Signals and the clock, as the loop asks about them."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from training import stopping
from training.stopping import SIGNALS, StopRequest, process_age


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_counts_and_none_interrupts(number: signal.Signals) -> None:
    stop = StopRequest(None, 2.0)
    assert not stop.requested
    assert stop.reason == "a request to another rank"
    os.kill(os.getpid(), number)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    assert stop.reason == number.name
    stop.close()
    os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.SIG_IGN


def test_the_clock_leaves_time_for_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(stopping, "process_age", lambda: 60.0)
    stop = StopRequest(10.0, 2.0)  # gone at 1540, leaves at 1420
    now = 1419.0
    assert not stop.requested
    stop.saved(50.0)
    assert not stop.requested, "twice as long fits in the margin"
    stop.saved(61.0)
    assert stop.requested
    assert stop.reason == "time limit of 10 minutes"


def test_the_clock_decides_without_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(stopping, "process_age", lambda: 60.0)
    stop = StopRequest(10.0, 2.0)
    now = 1420.0
    assert stop.requested


def test_age_counts_from_the_start_of_the_process() -> None:
    before = process_age()
    time.sleep(0.1)
    assert 0.05 < process_age() - before < 5.0
    assert 0.0 < before < 86400.0
