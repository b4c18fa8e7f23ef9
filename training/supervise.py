"""What a batch job does once training has ended, however it ended: `python -m training.supervise RUN --since SECONDS`.

The batch script (`slurm/train.sbatch`) runs the pre-flight check and training, and asks here after each. The answer is
one word on stdout, which the script obeys, and a line on stderr that says why:

    done      the run is finished
    again     start it again in this allocation, after a pause
    over      nothing is left to do in this allocation: the job is back in the queue, or was cancelled
    failed    somebody has to mend something first
    requeue [NODE ...]    outside of Slurm, where nobody has done that: start it again when there are machines for it,
              without the nodes named; where it was interrupted, whoever did that knows whether to

How training ended is told by `exit.json` (`training/ending.py`), or by `.NAME.refused.json` beside a run directory that
did not come to be; which nodes are bad, by the report of `python -m parallel.preflight`. Starts in a row that get no
further are counted in `RUN/standstill.json`, where there is no run yet in `.NAME.standstill.json` beside it, and
bounded.
With --before, ahead of the first start: exit status 1 if another job trains in the run directory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from training.ending import MARKER, refusal_of
from training.jobs import ENDING, Call, call, leave_out, own_job, requeue, seconds_left
from training.lock import LockError, hold
from training.run_directory import LOCK

STANDSTILL = "standstill.json"

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0
"""Seconds before the first start after a crash; each further one waits twice as long, up to the longest."""

WORTH_A_START = 600.0
"""Seconds. With less to the job's time limit a start after a crash would get nowhere before it is told to leave, if it
can be told at all: processes that have just started die of the signal."""

STARTS_WITHOUT_RUN = 2
"""A start whose ranks never met makes no run and leaves no word, and is worth one more try."""

MAX_STANDSTILL = 5

DAY, MAX_CRASHES = 24 * 3600.0, 24
"""Crashes within so many seconds, progress or not: machines in order have a few a week, and a run that crashes after
each checkpoint would otherwise go on for as long as it is paid for."""

Answer = Literal["done", "again", "requeue", "over", "failed"]


@dataclass(frozen=True)
class Standstill:
    """Starts in a row that left no later checkpoint.

    Attributes:
        count: of them.
        step: of the newest checkpoint; None if there is none.
        without_run: crashes before there was a run.
        crashes: when they were, of the last day, in seconds since 1970.
    """

    count: int = 0
    step: int | None = None
    without_run: int = 0
    crashes: tuple[float, ...] = ()

    def after(self, step: int | None) -> "Standstill":
        """With one more start, which left a checkpoint of `step`: the count begins anew where that is a later one."""
        if step is None or (self.step is not None and step <= self.step):
            return replace(self, count=self.count + 1)
        return replace(self, count=0, step=step)

    def crashed(self, now: float, *, has_run: bool) -> "Standstill":
        """With one more crash."""
        recent = (*(when for when in self.crashes if when > now - DAY), now)
        return replace(self, crashes=recent, without_run=self.without_run + (not has_run))


@dataclass(frozen=True)
class Decision:
    """What to do, why, how the run has stood still so far, and the nodes to leave out."""

    answer: Answer
    why: str
    standstill: Standstill = field(default_factory=Standstill)
    exclude: tuple[str, ...] = ()

    @property
    def pause(self) -> float:
        """Seconds to wait before a start after a crash."""
        if self.answer != "again":
            return 0.0
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** max(0, self.standstill.count - 1))


@dataclass(frozen=True)
class Outcome:
    """What a start left.

    Attributes:
        ending: content of exit.json, or of what a refused start left; None where training left none, as one that was
            killed.
        findings: of a pre-flight check that failed; None where training was started.
        saved: step of the newest checkpoint; None if there is none.
        has_run: whether the run directory holds a run; a start that is refused makes none.
        left: seconds to the job's time limit; None if it has none.
        now: in seconds since 1970.
    """

    ending: dict[str, Any] | None = None
    findings: dict[str, Any] | None = None
    saved: int | None = None
    has_run: bool = True
    left: float | None = None
    now: float = 0.0


def decide(
    outcome: Outcome, before: Standstill, max_standstill: int = MAX_STANDSTILL, max_crashes: int = MAX_CRASHES
) -> Decision:
    """
    Args:
        before: how the run stood still before this start.
        max_standstill: starts in a row that may get no further; with one more the job gives up.
        max_crashes: within a day; with one more the job gives up.
    """
    ending, findings = outcome.ending, outcome.findings
    after = before.after(outcome.saved)
    crashed = after.crashed(outcome.now, has_run=outcome.has_run)
    if findings is not None:
        mend = [*findings["asked"], *([] if findings["bad"] else findings["unequal"])]
        if mend:
            return Decision("failed", f"pre-flight: {'; '.join(mend)}", before)
        bad = (f"{node}: {', '.join(problems)}" for node, problems in findings["bad"].items())
        exclude = tuple(sorted(findings["bad"]))
        decision = Decision("requeue", f"pre-flight: {'; '.join(bad)}", after, exclude)
    elif ending is None:
        decision = Decision("again", "killed, or never started", crashed)
    else:
        said = f"{ending['reason']} at step {ending['step']}: {ending['detail']}"
        if ending["reason"] == "finished":
            return Decision("done", said)
        if not ending["resumable"]:
            return Decision("failed", said, before)
        interrupted = ending["reason"] == "interrupted"
        decision = Decision("requeue", said, after) if interrupted else Decision("again", said, crashed)
    return bounded(decision, outcome, max_standstill, max_crashes)


def bounded(decision: Decision, outcome: Outcome, max_standstill: int, max_crashes: int) -> Decision:
    """Gives up on a run that gets nowhere; leaves an allocation that is too short for another start."""
    count, crashes = decision.standstill.count, len(decision.standstill.crashes)
    if count > max_standstill:
        why = f"{count} starts in a row got no further; the last: {decision.why}"
        return replace(decision, answer="failed", why=why)
    if decision.answer != "again":
        return decision
    if crashes > max_crashes:
        return replace(decision, answer="failed", why=f"{crashes} crashes within a day; the last: {decision.why}")
    if not outcome.has_run:
        starts = decision.standstill.without_run
        if starts < STARTS_WITHOUT_RUN:
            return decision
        why = f"{starts} starts made no run; the last: {decision.why}; more stands further up"
        return replace(decision, answer="failed", why=why)
    if outcome.left is not None and outcome.left < decision.pause + WORTH_A_START:
        return replace(
            decision, answer="requeue", why=f"{decision.why}; {outcome.left:.0f} s of the allocation are left"
        )
    return decision


def supervise(
    run: Path,
    since: float,
    preflight: Path | None,
    max_standstill: int,
    call: Call,
    max_crashes: int = MAX_CRASHES,
) -> Decision:
    """Decides, and keeps count.

    Args:
        since: when the start was made, in seconds since 1970: an older exit.json is of an earlier one.
        call: runs a command of the scheduler and returns what it prints.
    """
    has_run = (run / "config.yaml").exists()
    kept, beside = run / STANDSTILL, run.parent / f".{run.name}.{STANDSTILL}"
    if has_run:
        beside.unlink(missing_ok=True)
    else:
        kept = beside
    before = counted(kept)
    ending = last_ending(run / MARKER, since) or (None if has_run else refusal(run, since))
    if ending is None and (busy := occupied(run)) is not None:
        return Decision("failed", busy, before)
    findings = json.loads(preflight.read_text()) if preflight is not None and preflight.exists() else None
    outcome = Outcome(ending, findings, saved_step(run), has_run, now=time.time())
    decision = decide(outcome, before, max_standstill, max_crashes)
    if decision.answer == "done":
        return keep(decision, kept)
    try:
        job = own_job(call)
    except subprocess.CalledProcessError:
        return keep(replace(decision, why=f"{decision.why}; Slurm does not answer"), kept)
    if job is not None:
        if job["JobState"] in ENDING:
            return Decision("over", f"{decision.why}; Slurm is ending the job ({job['JobState']})", before)
        outcome = replace(outcome, left=seconds_left(job, outcome.now))
        decision = decide(outcome, before, max_standstill, max_crashes)
    return keep(decision, kept)


def counted(kept: Path) -> Standstill:
    """What the start before wrote; nothing before the first."""
    if not kept.exists():
        return Standstill()
    content = json.loads(kept.read_text())
    return Standstill(**content | {"crashes": tuple(content.get("crashes", ()))})


def keep(decision: Decision, kept: Path) -> Decision:
    """Writes the count for the next start, or, where there is to be none, begins it anew for whoever mends what is
    wrong; a failure where it cannot be written, as then nothing would be bounded."""
    try:
        if decision.answer in ("done", "failed"):
            kept.unlink(missing_ok=True)
            return decision
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(decision.standstill)) + "\n")
    except OSError as error:
        why = f"{decision.why}; {kept}: cannot be written ({error.strerror}), so that starts cannot be counted"
        return replace(decision, answer="failed", why=f"{why}; name another log.directory")
    return decision


def last_ending(marker: Path, since: float) -> dict[str, Any] | None:
    """What a start that was made at `since` said of its end; None if it said nothing."""
    ending = json.loads(marker.read_text()) if marker.exists() else None
    return None if ending is None or ending["time"] < since else ending


def refusal(run: Path, since: float) -> dict[str, Any] | None:
    """What this job's start said beside a run that did not come to be; None if it said nothing."""
    ending = last_ending(run.parent / refusal_of(run), since)
    return None if ending is None or ending["job"] != os.environ.get("SLURM_JOB_ID") else ending


def occupied(run: Path) -> str | None:
    """Who else trains in the run directory, in words; None if nobody does, or what is left of this very job."""
    if not any((run / name).exists() for name in (LOCK, f"{LOCK}.owner")):
        return None
    with ExitStack() as guard:
        try:
            hold(run / LOCK, guard, doing="training")
        except LockError as error:
            return None if error.job is not None and error.job == os.environ.get("SLURM_JOB_ID") else str(error)
    return None


def saved_step(run: Path) -> int | None:
    """Step of the checkpoint that `checkpoints/latest` points at."""
    latest = run / "checkpoints" / "latest"
    return int(latest.readlink().name.removeprefix("step_")) if latest.is_symlink() else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    when = parser.add_mutually_exclusive_group(required=True)
    when.add_argument("--before", action="store_true", help="look only whether another job trains there")
    when.add_argument("--since", type=float, metavar="SECONDS", help="when it was started (date +%%s)")
    parser.add_argument("--preflight", type=Path, metavar="FILE", help="report of the pre-flight check, if that failed")
    standstill, crashes = f"starts that get no further ({MAX_STANDSTILL})", f"crashes within a day ({MAX_CRASHES})"
    parser.add_argument("--max-standstill", type=int, default=MAX_STANDSTILL, metavar="N", help=standstill)
    parser.add_argument("--max-crashes", type=int, default=MAX_CRASHES, metavar="N", help=crashes)
    options = parser.parse_args(argv)
    if options.before:
        if (busy := occupied(options.run)) is not None:
            print(f"supervise: {busy}", file=sys.stderr)
        return int(busy is not None)
    bounds = {"max_standstill": options.max_standstill, "max_crashes": options.max_crashes}
    decision = supervise(options.run, options.since, options.preflight, call=call, **bounds)
    pause = f", in {decision.pause:.0f} s" if decision.pause else ""
    print(f"supervise: {decision.answer}{pause}: {decision.why}", file=sys.stderr, flush=True)
    time.sleep(decision.pause)
    print(put_back(decision.exclude, call) if decision.answer == "requeue" else decision.answer)
    return 0


def put_back(exclude: Sequence[str], call: Call) -> str:
    """Puts the job back into the queue, to start without some nodes; what remains to be answered."""
    try:
        job = own_job(call)
        if job is None:
            return " ".join(["requeue", *exclude])
        requeue(job, call)
    except subprocess.CalledProcessError as error:
        _complain(error, "submit it without --no-requeue, or submit it once more")
        return "failed"
    try:
        if exclude:
            leave_out(job, exclude, call)
    except subprocess.CalledProcessError as error:
        _complain(error, "the job is in the queue, but may get the same nodes: run that by hand while it waits")
    return "over"


def _complain(error: subprocess.CalledProcessError, way_out: str) -> None:
    said = f"{' '.join(error.cmd)}: exit status {error.returncode}"
    print(f"supervise: {said}; {way_out}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
