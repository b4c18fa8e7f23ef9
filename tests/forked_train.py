"""`train.py` in a process forked from one that has imported it, six seconds less than a fresh interpreter's start."""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

from tests.parallel.launch import CPU_ONLY, server


class ForkedTrain:
    """`train.py ARGUMENTS`, with what of `subprocess.Popen` the tests need.

    Args:
        arguments: of the command line.
        said: directory for what the process says on its standard output and error.
    """

    def __init__(self, arguments: list[str], said: Path) -> None:
        self._out, self._err = said / "stdout", said / "stderr"
        said.mkdir(parents=True, exist_ok=True)
        self._process = server().Process(target=_main, args=(arguments, str(self._out), str(self._err)))
        with mock.patch.dict(os.environ, CPU_ONLY):
            self._process.start()

    @property
    def stdout(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._err.read_text(encoding="utf-8")

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        self._process.join(0)
        return self.returncode

    def wait(self, timeout: float) -> "ForkedTrain":
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"train.py did not end within {timeout} s:\n{self.stderr}")
        return self

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            assert self._process.pid is not None
            os.kill(self._process.pid, number)


def _main(arguments: list[str], out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= CPU_ONLY
    import torch

    import train

    torch.set_num_threads(1)
    sys.exit(train.main(arguments))
