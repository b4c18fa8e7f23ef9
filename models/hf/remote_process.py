"""A directory with modelling files of its own, loaded in a process that does not know Rondo."""

import io
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORKER = Path(__file__).with_name("remote_worker.py")


class RemoteModel:
    """`directory` through transformers with `trust_remote_code`, in fp32 on the CPU; ends with this object.

    Raises:
        ValueError: the directory cannot be loaded or fails, with the last line of what its process wrote.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._scratch = Path(tempfile.mkdtemp(prefix="rondo_export_"))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(self._scratch / "modules")}
        self._errors = self._scratch / "errors.txt"
        with self._errors.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", str(WORKER), str(directory.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=self._scratch,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        self._requests = Connection(os.dup(process.stdin.fileno()), readable=False)
        self._replies = Connection(os.dup(process.stdout.fileno()), writable=False)
        self._end = weakref.finalize(self, _stop, process, (self._requests, self._replies), self._scratch)

    def logits(self, input_ids: Tensor) -> Tensor:
        """`[B, T]` token ids -> `[B, T, N]`."""
        return self._ask(input_ids, 0)

    def generate(self, prompt: Tensor, count: int) -> Tensor:
        """`[1, T]` -> `[1, T + count]`, greedily."""
        return self._ask(prompt, count)

    def _ask(self, input_ids: Tensor, count: int) -> Tensor:
        buffer = io.BytesIO()
        torch.save({"input_ids": input_ids, "count": count}, buffer)
        try:
            self._requests.send_bytes(buffer.getbuffer())
            return torch.load(io.BytesIO(self._replies.recv_bytes()), weights_only=True)
        except (EOFError, OSError):
            written = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ValueError(f"its process ended: {written[-1] if written else 'it wrote nothing'}") from None


def _stop(process: "subprocess.Popen[Any]", pipes: tuple[Connection, Connection], scratch: Path) -> None:
    """Closes its input, at which it ends by itself; one that hangs is killed."""
    for pipe in pipes:
        pipe.close()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
