"""The variables of a batch script, looked at before anything is spent: `python -m training.variables train`.

A line on stderr for each that will not do, and exit status 2; the login node can be asked the same before a job waits
in the queue. Options of the evaluations that follow training are tried out: the tasks by `python -m eval --check`,
those of sbatch by its --test-only. A job that was put back into the queue tries neither again: they take up to a
minute, and sbatch refuses while all nodes for evaluations are down.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.jobs import environment_outside


@dataclass(frozen=True)
class Variable:
    """What one must be, whether a value is that, and what it is where it is not set."""

    must: str
    holds: Callable[[str], bool]
    default: str


def whole(least: int, most: float = float("inf")) -> Callable[[str], bool]:
    """Whether a text is a number from `least` to `most` to the shell as well, to which 010 is eight."""
    return lambda text: re.fullmatch(r"0|[1-9][0-9]*", text) is not None and least <= int(text) <= most


def known_host(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


NUMBER = "a whole number from 1, without leading zeros"
SWITCH = ("0 or 1", lambda text: text in ("0", "1"))

VARIABLES: dict[str, dict[str, Variable]] = {
    "train": {
        "RANKS_PER_NODE": Variable(NUMBER, whole(1), "a node's GPUs, or 1"),
        "RENDEZVOUS_HOST": Variable("a host that this one knows", known_host, "the first node"),
        "RENDEZVOUS_PORT": Variable("a port from 1 to 65535", whole(1, 65535), "one made of the job's number"),
        "PREFLIGHT": Variable(*SWITCH, "1"),
        "ON_CPU": Variable(*SWITCH, "0"),
        "LEAST_BANDWIDTH": Variable(
            "GB/s, as 40 or 12.5", lambda text: re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) is not None, "none"
        ),
        "MAX_STANDSTILL": Variable("a whole number from 0, without leading zeros", whole(0), "5"),
        "MAX_CRASHES": Variable("a whole number from 0, without leading zeros", whole(0), "24"),
        "OMP_NUM_THREADS": Variable(NUMBER, whole(1), "a process's share of the node's cores"),
    },
    "prepare": {
        "WORKERS": Variable(NUMBER, whole(1), "the task's cores"),
        "MERGE": Variable(*SWITCH, "1"),
    },
    "eval": {
        "RESULTS": Variable(
            "a file in a directory that exists",
            lambda text: Path(text).parent.is_dir() and not Path(text).is_dir(),
            "a file that is named for the model",
        ),
    },
}
"""By script; what is set to nothing counts as not set, as it does for the shell."""

Refused = Callable[[Sequence[str]], str | None]
"""Runs a command and returns what it has against its arguments; None if nothing."""


def refused(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, env=environment_outside(), capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    return done.stderr.strip() or f"exit status {done.returncode}"


def complaints(script: str, environment: Mapping[str, str], refused: Refused) -> list[str]:
    """What is wrong with the variables of slurm/SCRIPT.sbatch, a line each."""
    found = []
    for name, variable in VARIABLES[script].items():
        value = environment.get(name, "")
        if value and not variable.holds(value):
            found.append(f"{name}: {value!r}; must be {variable.must}; unset it for {variable.default}")
    if script != "prepare" and "\n" in environment.get("EVALUATE", ""):
        found.append(f"EVALUATE: {environment['EVALUATE']!r}; must be one line; put its options into one")
    elif script == "train":
        found += of_evaluations(environment, refused)
    return found


def of_evaluations(environment: Mapping[str, str], refused: Refused) -> list[str]:
    """What is wrong with the variables for the evaluation of each checkpoint."""
    tasks, options, results = (environment.get(name, "") for name in ("EVALUATE", "EVALUATE_WITH", "RESULTS"))
    if not tasks:
        if not options:
            return []
        only = "is for evaluations, which EVALUATE='--tasks A,B' asks for"
        return [f"EVALUATE_WITH: {options!r}; {only}; set that too, or unset it"]
    found = []
    if results:
        found.append(f"RESULTS: {results!r}; every evaluation would write there; unset it for RUN/evaluations")
    if int(environment.get("SLURM_RESTART_COUNT", "0")):
        return found
    said = refused([sys.executable, "-m", "eval", "RUN", "--check", *tasks.split()])
    if said is not None:
        why = said.splitlines()[-1]  # after argparse's usage
        found.append(f"EVALUATE: {tasks!r}; must be options of python -m eval ({why}); mend it, or unset it")
    said = refused(["sbatch", "--test-only", *options.split(), "slurm/eval.sbatch", "RUN"])
    if said is not None:
        found.append(
            f"EVALUATE_WITH: {options!r}; must be options with which sbatch takes slurm/eval.sbatch "
            f"({' '.join(said.split())}); mend it, or unset EVALUATE"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.variables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", choices=list(VARIABLES), help="of slurm/, without its ending")
    script = parser.parse_args(argv).script
    found = complaints(script, os.environ, refused)
    for line in found:
        print(f"{script}.sbatch: {line}", file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
