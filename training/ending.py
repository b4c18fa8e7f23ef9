"""How a run ended, for whoever started it: exit codes, and `exit.json` in the run directory.

torchrun makes 1 of every exit code, so scripts read the file:

    {"reason": "interrupted", "detail": "SIGUSR1", "step": 1200, "resumable": true, "time": 1767225600.0, "job": "4711"}

`reason` is finished, interrupted (the same command goes on) or failed. `resumable` tells whether the same command has
something left to do and a chance to do it: True after an interruption, a hang or a lost rank, False where the run is
finished or somebody has to mend something first. `step` is the last one that was completed; `time` is in seconds since
1970; `job` is the Slurm job or null. A run that was killed leaves no file. A start that was refused, or failed, before
there was a run directory leaves the same beside it, in `.NAME.refused.json`.
"""

import json
import os
import time
from pathlib import Path
from typing import Literal

FINISHED, FAILED = 0, 1
INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""

MARKER = "exit.json"

Reason = Literal["finished", "interrupted", "failed"]


def refusal_of(run: Path) -> str:
    """Name of the marker beside a run directory that did not come to be."""
    return f".{run.name}.refused.json"


def write_ending(
    directory: Path, reason: Reason, detail: str, *, step: int, resumable: bool, name: str = MARKER
) -> None:
    """Writes the marker, whole or not at all. The first of several processes that fail counts."""
    ending = {"reason": reason, "detail": detail, "step": step, "resumable": resumable, "time": time.time()}
    ending |= {"job": os.environ.get("SLURM_JOB_ID")}
    marker, beside = directory / name, directory / f".{name}.{os.getpid()}"
    beside.write_text(json.dumps(ending) + "\n", encoding="utf-8")
    try:
        if reason != "failed":
            beside.replace(marker)
        elif not marker.exists():
            beside.rename(marker)
    finally:
        beside.unlink(missing_ok=True)


def exit_code(reason: Reason) -> int:
    """The exit code of a process of the run.

    Under torchrun an interrupted process ends with 0: torchrun would take any other code for a crash, and start
    everybody again.
    """
    if reason == "interrupted" and "TORCHELASTIC_RUN_ID" in os.environ:
        return FINISHED
    return {"finished": FINISHED, "interrupted": INTERRUPTED, "failed": FAILED}[reason]
