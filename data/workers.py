"""Worker processes for a list of independent tasks."""

import itertools
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

REPORT_EVERY = 1 << 19  # units of progress gathered before a worker sends a message


class Progress(NamedTuple):
    """Units of work done since the last report, and tasks completed with them (0 or 1)."""

    units: int
    tasks: int


Task = Callable[[int], Iterator[int]]


def run_tasks(task: Task, indices: Iterable[int], workers: int) -> Iterator[Progress]:
    """Runs `task(index)`, which yields units of progress, for every index; one worker is this process itself.

    `task` must be picklable. What a task raises is raised here, after all workers are stopped; workers also stop
    when this process is gone. A worker that dies raises RuntimeError.
    """
    if workers == 1:
        for index in indices:
            yield from (Progress(units, 0) for units in task(index))
            yield Progress(0, 1)
        return
    remaining = iter(indices)
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of Arrow's threads
    processes: dict[Connection, BaseProcess] = {}
    try:
        for index in itertools.islice(remaining, workers):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the worker does
            processes[ours] = process
            ours.send(index)
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                progress = _receive(connection)
                yield progress
                if progress.tasks and (following := next(remaining, None)) is not None:
                    connection.send(following)
                elif progress.tasks:
                    connection.close()
                    processes.pop(connection).join()
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _receive(connection: Connection) -> Progress:
    try:
        message = connection.recv()
    except EOFError:
        raise RuntimeError("a worker process died, perhaps for lack of memory") from None
    if isinstance(message, BaseException):
        raise message
    return message


def _work(task: Task, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    try:
        while True:
            index, units = connection.recv(), 0
            try:
                for more in task(index):
                    units += more
                    if units >= REPORT_EVERY:
                        connection.send(Progress(units, 0))
                        units = 0
                message: Progress | Exception = Progress(units, 1)
            except Exception as error:
                message = _sendable(error)
            connection.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent closed the pipe or is gone


def _sendable(error: Exception) -> Exception:
    """The error, or its words where it does not survive the pipe, as one with a handle or a constructor of its own."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
