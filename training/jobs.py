"""The Slurm job that this process is part of: what Slurm says of it, and how it is put back into the queue."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime

Call = Callable[..., str]
"""Runs a command of the scheduler and returns what it prints."""

ENDING = ("CANCELLED", "COMPLETING", "DEADLINE", "NODE_FAIL", "PENDING", "PREEMPTED", "REQUEUED", "TIMEOUT")
"""States of a job whose processes still run: somebody has ended it or queued it again already."""


ATTEMPTS, PAUSE = 20, 15.0
"""How often a scheduler that does not answer is asked, and seconds between: slurmctld may restart, or fail over."""

QUICK_ATTEMPTS, QUICK_PAUSE = 3, 5.0
"""The same where Slurm is about to end this process."""


def call(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def patiently(call: Call, *command: str, attempts: int, pause: float) -> str:
    """What a command prints that may have to be run again; the last failure raises."""
    for _ in range(attempts - 1):
        try:
            return call(*command)
        except subprocess.CalledProcessError:
            time.sleep(pause)
    return call(*command)


def own_job(call: Call) -> dict[str, str] | None:
    """What `scontrol show job` says of this job, by key; None outside of Slurm.

    Raises:
        subprocess.CalledProcessError: Slurm has not answered for minutes.
    """
    number = os.environ.get("SLURM_JOB_ID")
    return None if number is None else _show(number, call)


def _show(number: str, call: Call) -> dict[str, str]:
    words = patiently(call, "scontrol", "--oneliner", "show", "job", number, attempts=ATTEMPTS, pause=PAUSE).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def seconds_left(job: dict[str, str], now: float) -> float | None:
    """Seconds to the job's time limit; None if it has none."""
    if job.get("TimeLimit") in (None, "UNLIMITED"):
        return None
    return datetime.fromisoformat(job["EndTime"]).timestamp() - now  # both in this host's local time


def requeue(job: dict[str, str], call: Call) -> None:
    """Puts the job back into the queue: number, options and log stay what they are.

    Slurm then ends the job's processes; this one goes on after SIGTERM.

    Raises:
        subprocess.CalledProcessError: Slurm refuses, or has not answered for minutes.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    command = ("scontrol", "requeue", job["JobId"])
    try:
        call(*command)
    except subprocess.CalledProcessError:
        if _show(job["JobId"], call)["JobState"] not in ENDING:  # the answer may have been lost, not the order
            call(*command)


def leave_out(job: dict[str, str], nodes: Sequence[str], call: Call) -> None:
    """Lets a job that has been requeued start without `nodes`.

    A running job's nodes to leave out cannot be changed, but a queued one's can, and a requeued one waits for two
    minutes before it starts.

    Raises:
        subprocess.CalledProcessError: Slurm refuses, or does not answer.
    """
    earlier = [name for name in [job.get("ExcNodeList", "(null)")] if name != "(null)"]
    command = ("scontrol", "update", f"JobId={job['JobId']}", f"ExcNodeList={','.join([*earlier, *nodes])}")
    patiently(call, *command, attempts=QUICK_ATTEMPTS, pause=QUICK_PAUSE)


def environment_outside() -> dict[str, str]:
    """The environment without what Slurm told this job about itself.

    A job that is submitted with it would take SLURM_GPUS_PER_NODE and the like for its own.
    """
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM") or key == "SLURM_CONF"}
