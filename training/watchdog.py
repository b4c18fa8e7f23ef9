"""Ends a job that hangs, and leaves behind where every rank stood."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.health import HealthConfig

REMEMBERED = 64
"""Steps of which the median is taken."""

GRACE = 5.0
"""Seconds between a rank's dump and its end: when the first rank ends, its launcher ends the others."""


def stacks_file(directory: Path, rank: int) -> Path:
    """Where a rank leaves its stacks in the run directory."""
    return directory / "stacks" / f"rank_{rank}.txt"


def dump_stacks(path: Path) -> None:
    """Writes the Python stacks of all threads of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)


class Watchdog:
    """Watches this rank's steps from a thread of its own.

    A step that takes longer than `hang_factor` times the median step, and than `hang_minutes`, has the stacks of all
    threads written to `stacks/rank_<rank>.txt` below the directory and to stderr, and the process ended. Only what
    happens inside `step` is watched, and the first step, which compiles, is not: validation and saving may take long.

    Every rank has one. A rank that is blocked in a collective finds out like the one that it waits for; one that is
    stopped altogether is ended by its launcher when the others are gone. A main thread that keeps Python's lock keeps
    the watching thread from running: for that case a timer of the C runtime writes the stacks to stderr and ends the
    process a little later. A whole job that is suspended for longer than the limit ends when it is continued.

    Args:
        directory: the run directory.
        config: see above; a `hang_factor` of None watches nothing.
        last_words: called with what happened before the process ends; it may hang or fail.
        exit_code: of the process.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        config: HealthConfig,
        *,
        last_words: Callable[[str], None],
        exit_code: int = 1,
    ) -> None:
        self._path = stacks_file(directory, rank)
        self._rank = rank
        self._factor, self._minimum = config.hang_factor, 60 * config.hang_minutes
        self._last_words, self._exit_code = last_words, exit_code
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._deadline: float | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._factor is not None:
            self._thread.start()

    @property
    def limit(self) -> float | None:
        """Seconds that the next step may take; None: any."""
        if self._factor is None or not self._seconds:
            return None
        return max(self._minimum, self._factor * statistics.median(self._seconds))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watches what happens inside, which is one step."""
        start, limit = time.monotonic(), self.limit
        if limit is not None:
            self._set_deadline(start + limit)
            faulthandler.dump_traceback_later(limit + 3 * GRACE, exit=True)
        try:
            yield
        finally:
            if limit is not None:
                faulthandler.cancel_dump_traceback_later()
            self._set_deadline(None)
        self._seconds.append(time.monotonic() - start)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _set_deadline(self, deadline: float | None) -> None:
        with self._changed:
            self._deadline = deadline
            if deadline is not None:
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                remaining = None if self._deadline is None else self._deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    break
                self._changed.wait(remaining)
        if not self._closed:
            self._end()

    def _end(self) -> None:
        limit = self.limit or 0.0
        what = f"hang: rank {self._rank} was in one step for more than {limit:.0f} s; stacks in {self._path.parent}"
        try:
            dump_stacks(self._path)
        finally:
            # In a thread, as the one that hangs may hold what it takes to write.
            speaker = threading.Thread(target=self._speak, args=(what,), daemon=True)
            speaker.start()
            speaker.join(GRACE)
            time.sleep(GRACE)
            os._exit(self._exit_code)

    def _speak(self, what: str) -> None:
        self._last_words(what)
        print(f"watchdog: {what}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
