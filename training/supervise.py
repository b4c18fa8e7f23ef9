"""What a batch job does once training has ended, however it ended: `python -m training.supervise RUN --since SECONDS`.

The batch script (`slurm/train.sbatch`) runs the pre-flight check and training, and asks here after each. The answer is
one word on stdout, which the script obeys, and a line on stderr that says why:

    done      the run is finished
    again     start it again in this allocation, after a pause
    over      another start of the job has been arranged: this one is requeued, or one without the bad nodes is queued
    failed    somebody has to mend something first

How training ended is told by `exit.json` (`training/ending.py`), which nodes are bad by the report of
`python -m parallel.preflight`. Starts in a row that get no further are counted in `RUN/standstill.json`, and bounded.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from training.ending import MARKER

STANDSTILL = "standstill.json"

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0
"""Seconds before the first start after a crash; each further one waits twice as long, up to the longest."""

Answer = Literal["done", "again", "requeue", "resubmit", "failed"]


@dataclass(frozen=True)
class Standstill:
    """Starts in a row that left no later checkpoint.

    Attributes:
        count: of them.
        step: of the newest checkpoint; None if there is none.
    """

    count: int = 0
    step: int | None = None

    def after(self, step: int | None) -> "Standstill":
        """With one more start, which left a checkpoint of `step`: the count begins anew where that is a later one."""
        if step is None or (self.step is not None and step <= self.step):
            return Standstill(self.count + 1, self.step)
        return Standstill(0, step)


@dataclass(frozen=True)
class Decision:
    """What to do, why, how the run has stood still so far, and the nodes to leave out."""

    answer: Answer
    why: str
    standstill: Standstill = field(default_factory=Standstill)
    exclude: tuple[str, ...] = ()

    @property
    def pause(self) -> float:
        """Seconds to wait before a start after a crash or a bad node."""
        if self.answer not in ("again", "resubmit"):
            return 0.0
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** max(0, self.standstill.count - 1))


def decide(
    ending: dict[str, Any] | None,
    findings: dict[str, Any] | None,
    saved: int | None,
    before: Standstill,
    max_standstill: int,
) -> Decision:
    """
    Args:
        ending: content of exit.json; None where training left none, as one that was killed.
        findings: of a pre-flight check that failed; None where training was started.
        saved: step of the newest checkpoint; None if there is none.
        before: how the run stood still before this start.
        max_standstill: starts in a row that may get no further; with one more the job gives up.
    """
    if findings is not None and not findings["bad"]:
        return Decision("failed", f"pre-flight: {'; '.join(findings['unequal'])}", before)
    if findings is not None:
        bad = (f"{node}: {', '.join(problems)}" for node, problems in findings["bad"].items())
        said, answer = f"pre-flight: {'; '.join(bad)}", "resubmit"
    elif ending is None:
        said, answer = "killed, or never started", "again"
    else:
        said = f"{ending['reason']} at step {ending['step']}: {ending['detail']}"
        if ending["reason"] == "finished":
            return Decision("done", said)
        if not ending["resumable"]:
            return Decision("failed", said, before)
        answer = "requeue" if ending["reason"] == "interrupted" else "again"
    after = before.after(saved)
    if after.count > max_standstill:
        return Decision("failed", f"{after.count} starts in a row got no further; the last: {said}", after)
    exclude = tuple(sorted(findings["bad"])) if findings is not None else ()
    return Decision(answer, said, after, exclude)  # type: ignore[arg-type]


def resubmission(job: dict[str, str], exclude: Sequence[str]) -> list[str]:
    """The sbatch command of a job like this one, without some nodes, to start when this one has ended.

    Args:
        job: what `scontrol show job` says of it, by key. A running job's own nodes cannot be changed.
    """
    options = {
        "dependency": f"afterany:{job['JobId']}",
        "exclude": ",".join([*exclude, *(name for name in [job.get("ExcNodeList", "(null)")] if name != "(null)")]),
        "job-name": job["JobName"],
        "nodes": job["NumNodes"].split("-")[0],
        "time": job["TimeLimit"],
        "partition": job["Partition"],
        "account": job.get("Account"),
        "qos": job.get("QOS"),
        "constraint": job.get("Features"),
        "gres": job.get("TresPerNode", "(null)").removeprefix("gres:"),
        "reservation": job.get("Reservation"),
        "cpus-per-task": job.get("CPUs/Task"),
        "output": job["StdOut"],
    }
    given = [f"--{key}={value}" for key, value in options.items() if value and value not in ("(null)", "N/A")]
    return ["sbatch", "--parsable", "--requeue", "--open-mode=append", *given, *job["Command"].split()]


def supervise(
    run: Path, since: float, preflight: Path | None, max_standstill: int, call: Callable[..., str]
) -> Decision:
    """Decides, keeps count, and queues a job without the bad nodes where that is the answer.

    Args:
        since: when the start was made, in seconds since 1970: an older exit.json is of an earlier one.
        call: runs a command of the scheduler and returns what it prints.
    """
    kept, marker = run / STANDSTILL, run / MARKER
    before = Standstill(**json.loads(kept.read_text())) if kept.exists() else Standstill()
    ending = json.loads(marker.read_text()) if marker.exists() else None
    if ending is not None and ending["time"] < since:
        ending = None
    findings = json.loads(preflight.read_text()) if preflight is not None and preflight.exists() else None
    decision = decide(ending, findings, saved_step(run), before, max_standstill)
    if run.exists():
        kept.write_text(json.dumps(asdict(decision.standstill)) + "\n")
    if decision.answer == "resubmit":
        words = call("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]).split()
        call(*resubmission(dict(word.split("=", 1) for word in words if "=" in word), decision.exclude))
    return decision


def saved_step(run: Path) -> int | None:
    """Step of the checkpoint that `checkpoints/latest` points at."""
    latest = run / "checkpoints" / "latest"
    return int(latest.readlink().name.removeprefix("step_")) if latest.is_symlink() else None


def _call(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--since", type=float, required=True, metavar="SECONDS", help="when it was started (date +%%s)")
    parser.add_argument("--preflight", type=Path, metavar="FILE", help="report of the pre-flight check, if that failed")
    parser.add_argument("--max-standstill", type=int, default=5, metavar="N", help="starts that get no further (5)")
    options = parser.parse_args(argv)
    decision = supervise(options.run, options.since, options.preflight, options.max_standstill, _call)
    pause = f", in {decision.pause:.0f} s" if decision.pause else ""
    print(f"supervise: {decision.answer}{pause}: {decision.why}", file=sys.stderr, flush=True)
    time.sleep(decision.pause)
    if decision.answer == "requeue":  # last: it ends the batch script, and this process with it
        _call("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    print({"requeue": "over", "resubmit": "over"}.get(decision.answer, decision.answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
