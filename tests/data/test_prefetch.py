import threading
import time
from collections.abc import Iterator

import pytest

from data.prefetch import prefetch


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_keeps_the_order_and_ends() -> None:
    assert list(prefetch(range(50), 3)) == list(range(50))
    assert not readers()


def test_reads_ahead_as_far_as_told_and_no_further() -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    items = prefetch(numbers(), 3)
    assert not read  # nothing starts before the first request
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(read) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(read) == 5  # one taken, three ready, one waiting for a place
    items.close()  # type: ignore[attr-defined]


def test_closing_stops_the_thread() -> None:
    items = prefetch(iter(int, 1), 2)
    next(items)
    assert readers()
    items.close()  # type: ignore[attr-defined]
    assert not readers()


def test_errors_arrive_after_the_items_before_them() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("damaged")

    items = prefetch(broken(), 4)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="damaged"):
        next(items)
    assert not readers()
