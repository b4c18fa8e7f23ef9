"""Ranks for tests: processes that form one gloo group on this machine and run functions on request.

    def losses(grid: Grid, stage: int) -> list[float]: ...        # in the test file; runs on every rank

    def test_losses(ranks):
        first, second = ranks(2).run(losses, stage=1)

DeepSpeed is never imported in pytest's own process: a server imports it once and forks the ranks. The `ranks` fixture
starts each number of them once and keeps them for all tests.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock

THREADS = 40
"""Of one rank, three for each process group."""

CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def server() -> ForkServerContext:
    """Forks processes that have imported what trains."""
    context = multiprocessing.get_context("forkserver")
    # The second is what DeepSpeed imports when an engine is built, three seconds of torch.compile.
    context.set_forkserver_preload(["train", "deepspeed.runtime.zero.muon.original_muon"])
    return context


class Ranks:
    """`size` processes in one process group.

    Args:
        size: number of ranks.
        env: environment variables of the ranks, besides the usual ones.
    """

    def __init__(self, size: int, env: dict[str, str] | None = None) -> None:
        context = server()
        port = _free_port()
        self._connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            distributed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            rank_env = {key: str(value) for key, value in distributed.items()} | (env or {})
            process = context.Process(target=_serve, args=(theirs, rank_env), daemon=True)
            with mock.patch.dict(os.environ, CPU_ONLY):
                process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    @property
    def tired(self) -> bool:
        """Whether they should be replaced: each process group has a thread that looks for work a hundred times a
        second, engines make some that nothing ends, and a few hundred take all of a small machine."""
        return len(os.listdir(f"/proc/{self.processes[0].pid}/task")) > THREADS

    def start(self, function: Callable[..., Any], /, **kwargs: Any) -> None:
        """Has every rank call `function(grid, **kwargs)`, and does not wait. `function` must be importable."""
        for connection in self._connections:
            connection.send((function, kwargs))

    def join(self, timeout: float = 120.0) -> list[Any]:
        """The results of the last `start`, one a rank.

        Raises:
            RuntimeError: a rank raised, died or took longer than `timeout` seconds; all ranks are ended then.
        """
        deadline = time.monotonic() + timeout
        results, problems = [], []
        for rank, connection in enumerate(self._connections):
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    problems.append(f"rank {rank}: no answer within {timeout} s")
                    continue
                succeeded, result = connection.recv()
                results.append(result)
                if not succeeded:
                    problems.append(f"rank {rank}:\n{result}")
            except (EOFError, ConnectionError):
                problems.append(f"rank {rank}: died")
        if problems:
            self.close()
            raise RuntimeError("\n".join(problems))
        return results

    def run(self, function: Callable[..., Any], /, *, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """`start` and `join`."""
        self.start(function, **kwargs)
        return self.join(timeout)

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self._connections):
            process.join()
            connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(connection: Connection, env: dict[str, str]) -> None:
    """A rank's life: join the group, then answer (succeeded, result) to each call until the pipe closes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | CPU_ONLY | env
    import torch

    from parallel.grid import init_distributed

    torch.set_num_threads(1)
    grid = init_distributed(timeout_minutes=2)
    while True:
        try:
            function, kwargs = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(grid, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)
