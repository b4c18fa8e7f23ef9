"""The Slurm job that this process is part of: what Slurm says of it, and how it is put back into the queue."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime

Call = Callable[..., str]
"""Runs a command of the scheduler and returns what it prints."""

ENDING = ("CANCELLED", "COMPLETING", "DEADLINE", "NODE_FAIL", "PENDING", "PREEMPTED", "REQUEUED", "TIMEOUT")
"""States of a job whose processes still run: somebody has ended it or queued it again already."""


def call(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def own_job(call: Call) -> dict[str, str] | None:
    """What `scontrol show job` says of this job, by key; None outside of Slurm."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        return None
    words = call("scontrol", "--oneliner", "show", "job", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def seconds_left(job: dict[str, str], now: float) -> float | None:
    """Seconds to the job's time limit; None if it has none."""
    if job.get("TimeLimit") in (None, "UNLIMITED"):
        return None
    return datetime.fromisoformat(job["EndTime"]).timestamp() - now  # both in this host's local time


def requeue(job: dict[str, str], exclude: Sequence[str], call: Call) -> None:
    """Puts the job back into the queue, to start without some nodes: number, options and log stay what they are.

    Slurm then ends the job's processes; this one goes on after SIGTERM. A running job's nodes to leave out cannot be
    changed, but a queued one's can, and a requeued one waits for two minutes before it starts.

    Raises:
        subprocess.CalledProcessError: Slurm refuses.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    call("scontrol", "requeue", job["JobId"])
    if exclude:
        earlier = [name for name in [job.get("ExcNodeList", "(null)")] if name != "(null)"]
        call("scontrol", "update", f"JobId={job['JobId']}", f"ExcNodeList={','.join([*earlier, *exclude])}")


def environment_outside() -> dict[str, str]:
    """The environment without what Slurm told this job about itself.

    A job that is submitted with it would take SLURM_GPUS_PER_NODE and the like for its own.
    """
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM") or key == "SLURM_CONF"}
