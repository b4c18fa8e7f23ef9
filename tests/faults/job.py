"""One start of a training job: its ranks as processes that run train.py, killed at a moment that the test chooses."""

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.parallel.launch import CPU_ONLY, server

ROOT = Path(__file__).resolve().parent.parent.parent


class Kill(NamedTuple):
    """SIGKILL from within, `delay` seconds after so many operations on files of saves.

    What Python opens, makes, renames and removes there is counted; what is written in between takes the delay.
    """

    rank: int
    after: int
    delay: float


class Job:
    """Ranks that are running; `stderr` of each is a file below `scratch`.

    Args:
        arguments: of train.py.
        size: number of ranks.
        scratch: a directory for what they say.
        kill: when a rank ends itself.
        small_files: this rank cannot make files longer than 64 KiB, as on a full disk of its own.
        faults: what `tests/faulty_train.py` spoils in every rank.
    """

    def __init__(
        self,
        arguments: list[str],
        size: int,
        scratch: Path,
        *,
        kill: Kill | None = None,
        small_files: int | None = None,
        faults: dict[str, Any] | None = None,
    ) -> None:
        context = server()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.words = [scratch / f"stderr_{rank}" for rank in range(size)]
        self.processes: list[BaseProcess] = []
        for rank, words in enumerate(self.words):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            process = context.Process(
                target=_train,
                args=(
                    arguments,
                    {key: str(value) for key, value in env.items()},
                    words,
                    kill if kill is not None and kill.rank == rank else None,
                    small_files == rank,
                    faults or {},
                ),
                daemon=True,
            )
            with mock.patch.dict(os.environ, CPU_ONLY):
                process.start()
            self.processes.append(process)

    @property
    def alive(self) -> list[bool]:
        return [process.is_alive() for process in self.processes]

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGKILL)

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Exit codes of the ranks, once all have ended; the rest is killed when one was, as torchrun does it."""
        deadline = time.monotonic() + seconds
        while any(self.alive):
            assert time.monotonic() < deadline, f"{self.alive} of the ranks still run; {self.said()}"
            if any(process.exitcode == -signal.SIGKILL for process in self.processes):
                time.sleep(0.05)
                self.kill(list(range(len(self.processes))))
            time.sleep(0.01)
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """What all ranks have written to stderr."""
        return "".join(path.read_text(errors="replace") for path in self.words if path.exists())


def _train(
    arguments: list[str],
    env: dict[str, str],
    words: Path,
    kill: Kill | None,
    small_files: bool,
    spoiled: dict[str, Any],
) -> None:
    """A rank's life."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | CPU_ONLY | env
    os.chdir(ROOT)
    for path, descriptor in ((Path(os.devnull), 1), (words, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    if small_files:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if kill is not None:
        _end_after(kill)
    import torch

    import train
    from tests.faulty_train import faults

    torch.set_num_threads(1)
    with faults(**spoiled) if spoiled else contextlib.nullcontext():
        code = train.main(arguments)
    sys.stderr.flush()
    os._exit(code)  # as a rank that has nothing left to do; a forked interpreter has its parent's handlers besides


def _end_after(kill: Kill) -> None:
    left = kill.after

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event not in ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.scandir"):
            return
        if not any("/checkpoints/." in os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)):
            return
        left -= 1
        if left == 0:
            if kill.delay:
                threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
