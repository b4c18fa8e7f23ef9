"""Starts a command for each new checkpoint of a run: `python -m training.followers RUN -- sbatch slurm/eval.sbatch`.

The checkpoint's path is added to the command's end; the environment's word on the Slurm job at hand is kept from it.
Checkpoints that a command was started for are listed in `RUN/followed.txt`, so that whoever is started again, or
beside another, starts none twice; one that is saved anew, after the run went back, is another. Runs until it is ended,
or with --once looks once.
"""

import argparse
import fcntl
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from models.checkpoint import MANIFEST, list_checkpoints
from training.jobs import environment_outside

FOLLOWED = "followed.txt"


def follow(run: Path, start: Callable[[Path], None]) -> list[Path]:
    """Calls `start` with each checkpoint that it has not been called with, oldest first; returns them.

    A call that raises is made again by the next look.
    """
    checkpoints = run / "checkpoints"
    if not checkpoints.is_dir():
        return []
    started = []
    with (run / FOLLOWED).open("a+") as listed:
        fcntl.flock(listed, fcntl.LOCK_EX)
        listed.seek(0)
        known = set(listed.read().splitlines())
        for path in list_checkpoints(checkpoints):
            content = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:12]
            if (line := f"{path.name} {content}") not in known:
                start(path)
                listed.write(f"{line}\n")
                listed.flush()
                started.append(path)
    return started


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.followers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; it need not exist yet")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to start, after --")
    parser.add_argument("--every", type=float, default=30.0, metavar="SECONDS", help="between looks (30)")
    parser.add_argument("--once", action="store_true", help="look once and end")
    options = parser.parse_args(argv)

    def start(path: Path) -> None:
        command = [*options.command, str(path)]
        done = subprocess.run(command, env=environment_outside(), stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: exit status {done.returncode}: {' '.join(done.stderr.split())}")
        print(done.stderr, end="", file=sys.stderr, flush=True)

    said = ""
    while True:
        failure = ""
        try:
            follow(options.run, start)
        except OSError as error:
            failure = f"followers: {error}"
            if failure != said:  # what stays wrong for a day is said once
                print(failure, file=sys.stderr, flush=True)
        said = failure
        if options.once:
            return int(bool(failure))
        time.sleep(options.every)


if __name__ == "__main__":
    sys.exit(main())
