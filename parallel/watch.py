"""Signs of life between ranks, so that a job with a dead peer ends with the rank named instead of hanging.

Communication libraries name neither: gloo says that a connection was closed, or nothing until its timeout. Here each
rank tells the store every few seconds that it lives and what it is doing, and looks for the next rank's word. Who finds
a rank silent leaves a verdict in the store; all ranks read it, say it, and end. What a rank is doing is read from its
stack, so that every collective is covered, DeepSpeed's among them. On GPUs kernels run behind the stack: there it tells
where a rank waits for its device.
"""

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from parallel.grid import Grid

ROOT = Path(__file__).resolve().parent.parent
BEATS = 12
"""Words a rank may miss before it counts as dead; after an error in a collective a quarter of them."""

ANSWER = 5.0
"""Seconds in which the store answers what a thread has asked when its watch is closed."""

_watches: list["Watch"] = []


class Watch:
    """Watches from when it is made until `close`.

    Args:
        grid: the ranks; alone, there is nothing to watch.
        timeout_minutes: how long a rank may wait for another. A silent one is noticed within half of it, and within
            two minutes.

    Attributes:
        last_words: called with what happened before the process ends; it may hang or fail.
    """

    def __init__(self, grid: Grid, timeout_minutes: float) -> None:
        self.rank, self.world_size = grid.rank, grid.world_size
        self.silence = min(timeout_minutes * 60 / 2, 120.0)
        self.interval = min(self.silence / BEATS, 2.0)
        self.last_words: Callable[[str], None] = lambda reason: None
        self._explained: tuple[BaseException, str] | None = None
        self._closed = threading.Event()
        self._over = threading.Lock()
        self._beaten = time.monotonic()
        self._threads: list[threading.Thread] = []
        if self.world_size == 1:
            return
        # A connection of its own: while the main thread waits for the store, it holds the shared one.
        shared: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("watch", shared.clone())
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._guard)]
        for thread in self._threads:
            thread.start()
        _watches.append(self)
        atexit.register(self.close)

    def close(self) -> None:
        """Stops watching; for ranks that are about to end.

        Waits for the threads, as an interpreter that ends while one of them asks the store ends by SIGABRT.
        """
        self._closed.set()
        for thread in self._threads:
            thread.join(ANSWER)
        if self in _watches:
            _watches.remove(self)
            atexit.unregister(self.close)

    def explain(self, error: BaseException) -> str | None:
        """Which rank's death, or absence, made a collective fail with `error`; None if it came from elsewhere.

        Waits until the others had time to give a sign of life; once for an error, however often it is asked about.
        """
        if self._explained is not None and self._explained[0] is error:
            return self._explained[1]
        operation = operation_of(error.__traceback__)
        if operation is None:
            return None
        with self._over:  # nobody else ends the process meanwhile
            words = f"{self._missing()}; {operation} failed: {str(error).splitlines()[0]}"
        self._explained = (error, words)
        return words

    def _missing(self) -> str:
        try:
            before = self._words()
            time.sleep(self.interval * BEATS / 4)
            after = self._words()
        except (RuntimeError, OSError):
            return "the store of the job is gone, and with it the rank or launcher that keeps it, rank 0 or its node"
        silent = [rank for rank in range(self.world_size) if before[rank][0] == after[rank][0]]
        if silent:
            return "; ".join(f"rank {rank} gives no sign of life, last seen {after[rank][1]}" for rank in silent)
        waiting = "; ".join(f"rank {rank} is {after[rank][1]}" for rank in range(self.world_size) if rank != self.rank)
        return f"every rank lives: {waiting}"

    def _words(self) -> dict[int, tuple[int, str]]:
        """The last word of each rank: its number, and what it was doing."""
        found = {}
        for rank in range(self.world_size):
            known = self._store.check([str(rank)])
            count, doing = json.loads(self._store.get(str(rank))) if known else (0, "before its first step")
            found[rank] = count, doing
        return found

    def _beat(self) -> None:
        """Gives this rank's word, and looks for the next rank's and for a verdict."""
        count, heard, since = 0, -1, time.monotonic()
        peer = (self.rank + 1) % self.world_size
        while not self._closed.wait(self.interval):
            count += 1
            try:
                self._store.set(str(self.rank), json.dumps([count, doing()]))
                known = self._store.check([str(peer)])
                word, peer_doing = json.loads(self._store.get(str(peer))) if known else (-1, "before its first step")
                if word != heard:
                    heard, since = word, time.monotonic()
                elif time.monotonic() - since > self.silence:
                    silent = f"rank {peer} gave no sign of life for {self.silence:.0f} s, last seen {peer_doing}"
                    self._store.set("verdict", silent)
                if self._store.check(["verdict"]):
                    self._end(self._store.get("verdict").decode())
            except (RuntimeError, OSError):  # who ends on its own, as when a run is refused, does so meanwhile
                if not self._closed.wait(self.interval * BEATS / 4):
                    self._end("the store of the job is gone, and with it the rank or launcher that keeps it")
            self._beaten = time.monotonic()

    def _guard(self) -> None:
        """Ends the process when the store itself does not answer: a stopped rank may be the one that keeps it."""
        while not self._closed.wait(self.interval):
            if time.monotonic() - self._beaten > self.silence + 2 * self.interval:
                self._end(
                    f"the store of the job gave no answer for {self.silence:.0f} s: rank 0 or the launcher, which "
                    "keeps it, is stopped or its node unreachable"
                )

    def _end(self, reason: str) -> None:
        if self._closed.is_set() or not self._over.acquire(blocking=False):
            return
        print(f"rank {self.rank}: {reason}; this rank was {doing()}", file=sys.stderr, flush=True)
        speaker = threading.Thread(target=self.last_words, args=(reason,), daemon=True)
        speaker.start()
        speaker.join(self.interval)
        os._exit(1)  # the main thread waits in a collective that will not return


def explained(error: BaseException) -> str | None:
    """`Watch.explain` of the watch that is active; None without one."""
    return _watches[-1].explain(error) if _watches else None


def operation_of(traceback: TracebackType | None) -> str | None:
    """The collective that an exception came out of, and where it was called; None if it came from elsewhere."""
    return _described([(frame, line) for frame, line in walk_tb(traceback)][::-1])


def doing() -> str:
    """What the main thread does, or a thread of autograd's that is in a collective: "in all_reduce at FILE:LINE"."""
    frames = sys._current_frames()
    watching = {thread.ident for watch in _watches for thread in watch._threads}
    main = threading.main_thread().ident
    stacks = [_stack(frames[thread]) for thread in frames if thread not in watching]
    found = next((text for stack in stacks if (text := _described(stack)) is not None), None)
    if found is not None:
        return f"in {found}"
    stack = _stack(frames[main]) if main in frames else []
    return next((f"at {_place(*entry)}" for entry in stack if _is_ours(entry[0])), "outside of Python")


Stack = list[tuple[FrameType, int]]
"""Frames and the lines they are at, the innermost first."""


def _described(stack: Stack) -> str | None:
    """The innermost collective of torch's, or of ours that waits, and who called it."""
    name: Any = None
    for frame, line in stack:
        file = frame.f_code.co_filename
        if file.endswith("distributed_c10d.py"):
            name = frame.f_code.co_name
        elif _is_ours(frame):
            if name is None and not file.endswith("parallel/collectives.py"):
                return None
            return f"{name or frame.f_code.co_name.strip('_')} at {_place(frame, line)}"
    return None


def _stack(frame: FrameType | None) -> Stack:
    found: Stack = []
    while frame is not None:
        found.append((frame, frame.f_lineno))
        frame = frame.f_back
    return found


def _is_ours(frame: FrameType) -> bool:
    file = Path(frame.f_code.co_filename)
    return file.is_relative_to(ROOT) and ".venv" not in file.parts and file.name != "watch.py"


def _place(frame: FrameType, line: int) -> str:
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{line} ({frame.f_code.co_name})"
