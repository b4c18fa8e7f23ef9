"""When a run is to finish its step, save and leave before its last step."""

import os
import signal
import time
from types import FrameType

from training.lock import process_start

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notes signals and watches the clock; the loop asks before each step.

    From here on a signal does nothing but leave a note, so that none interrupts a save, however many come; SIGQUIT and
    SIGKILL end the process at once.

    Args:
        limit_minutes: the run is to have left by then, counted from this process's start; None: whenever it is done.
        margin_minutes: of these, what is kept for the last step and the save. More is kept where twice the longest
            save, told to `saved`, is longer.
    """

    def __init__(self, limit_minutes: float | None, margin_minutes: float) -> None:
        self._ends = None if limit_minutes is None else time.monotonic() - process_age() + 60 * limit_minutes
        self._margin = 60 * margin_minutes
        self._reason: str | None = None
        self._limit_minutes = limit_minutes
        for number in SIGNALS:
            signal.signal(number, self._note)

    @property
    def requested(self) -> bool:
        """Whether this rank wants to leave."""
        if self._reason is None and self._ends is not None and time.monotonic() >= self._ends - self._margin:
            self._reason = f"time limit of {self._limit_minutes:g} minutes"
        return self._reason is not None

    @property
    def reason(self) -> str:
        return self._reason or "a request to another rank"

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self._margin = max(self._margin, 2 * seconds)

    def close(self) -> None:
        """The run has left, and the exit code is decided: signals are ignored for the rest of the process."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name


def process_age() -> float:
    """Seconds since this process started; importing what a run needs takes some of them."""
    start = process_start(os.getpid())
    return 0.0 if start is None else time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")
