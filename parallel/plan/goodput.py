"""How much of a job's time becomes training when machines fail: in closed form, and simulated.

Failures come at random and independently, at a rate of `gpus / mtbf`. After one, the job takes `restart` seconds to go
on from its newest complete checkpoint. A checkpoint is begun every `interval` seconds of training, makes training wait
for `wait` seconds, and is complete `write` seconds after that. Young, 1974 (Communications of the ACM 17, 530), and
Daly, 2006 (Future Generation Computer Systems 22, 303), give the best interval.
"""

import math
import random
from dataclasses import dataclass, replace

MTBF = 54 * 24 * 3600 * 16384 / 419
"""Seconds between failures of one GPU and its share of the machine: 419 unexpected interruptions of 16,384 H100s in 54
days (Llama 3, arXiv 2407.21783, section 3.3.4)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    Attributes:
        gpus: of the job.
        interval: seconds of training between checkpoints.
        wait: seconds that training waits for each.
        write: seconds from then until it is complete; the next one is not begun before.
        restart: seconds from a failure to the first step after it.
        mtbf: seconds between failures of one GPU.
    """

    gpus: int
    interval: float
    wait: float
    write: float
    restart: float
    mtbf: float = MTBF

    def __post_init__(self) -> None:
        for key in ("gpus", "interval", "mtbf"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: {getattr(self, key)}; must be positive")
        for key in ("wait", "write", "restart"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)}; must not be negative")
        if self.write > self.interval:
            raise ValueError(
                f"write: {self.write}; must be at most the interval ({self.interval}), as no checkpoint is begun "
                "before the last one is complete; save less often, or faster"
            )

    @property
    def between_failures(self) -> float:
        """Mean seconds between failures of the job."""
        return self.mtbf / self.gpus


def goodput(job: Job) -> float:
    """Expected share of the time that becomes training which is kept.

    A life between failures lasts 1 / rate on average, and restart seconds before it. The k-th checkpoint of it is kept
    if the failure comes later than k (interval + wait) + write: with chance e^(-rate ...), whose sum over all k is that
    of a geometric series. Without `write` this is Daly's equation for a restart that does not fail.
    """
    rate = 1 / job.between_failures
    checkpoints = math.exp(-rate * job.write) / math.expm1(rate * (job.interval + job.wait))
    return job.interval * checkpoints / (job.between_failures + job.restart)


def best_interval(job: Job) -> float:
    """Daly's estimate of the interval with the highest goodput; Young's is its first term. At least what a checkpoint
    takes to be complete."""
    mean, wait = job.between_failures, job.wait
    if wait >= 2 * mean:
        return max(mean, job.write)
    share = wait / (2 * mean)
    return max(math.sqrt(2 * wait * mean) * (1 + math.sqrt(share) / 3 + share / 9) - wait, job.write, 1e-9)


def at_best(job: Job) -> Job:
    """The job with its best interval."""
    return replace(job, interval=best_interval(job))


def simulated(job: Job, *, failures: int, seed: int) -> float:
    """Share of the time that became training which was kept, over a run of so many failures."""
    chance = random.Random(seed)
    clock = kept = 0.0
    for _ in range(failures):
        survived = chance.expovariate(1 / job.between_failures)
        clock += survived + job.restart
        cycle = job.interval + job.wait
        # The k-th checkpoint of this life is complete after k cycles and the time it takes to be written.
        complete = max(0, math.floor((survived - job.write) / cycle))
        kept += complete * job.interval
    return kept / clock
