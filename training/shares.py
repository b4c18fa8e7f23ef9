"""The share of a corpus that a task of a Slurm array prepares: `python -m training.shares slurm/prepare.sbatch ...`.

Prints it as `python -m data.prepare --shard` takes it, outside of an array nothing. The array's first task queues the
same script with the same arguments and no array, to merge the shares once all tasks have succeeded; MERGE=0 leaves that
to somebody else.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.jobs import Call, environment_outside, own_job


def share(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(I, N) for the share I of N of this task; None outside of an array.

    Raises:
        ValueError: the array is not 0 to N-1; shares would be missing. A task that is requeued is still told of all.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    keys = ("ID", "MIN", "MAX", "COUNT")
    task, first, last, count = (int(environment[f"SLURM_ARRAY_TASK_{key}"]) for key in keys)
    if (first, last) != (0, count - 1):
        raise ValueError(
            f"--array: {count} of the tasks {first} to {last}; must be all from 0, such as 0-7, as each does the share "
            "of its number; to run one again: scontrol requeue JOB_TASK, or the same command without --array, which "
            "does what is missing and merges"
        )
    return task, count


def queue_merge(script: str, arguments: Sequence[str], call: Call) -> None:
    """Queues the job that merges, where this one went; not if it waits already, as after this task was requeued.

    Raises:
        subprocess.CalledProcessError: Slurm refuses.
    """
    array = os.environ["SLURM_ARRAY_JOB_ID"]
    name = f"merge-{array}"
    if call("squeue", "--noheader", f"--name={name}").strip():
        return
    job = own_job(call)
    assert job is not None, "a task of an array is a job"
    options = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", f"--job-name={name}"]
    options += [f"--output={Path(job['StdOut']).parent}/%x.log", f"--time={job['TimeLimit']}"]
    places = {key: os.environ.get(f"SLURM_JOB_{key.upper()}") for key in ("partition", "account", "qos", "reservation")}
    options += [f"--{key}={value}" for key, value in places.items() if value]
    print(call("sbatch", *options, script, *arguments), end="", file=sys.stderr, flush=True)


def call_outside(*command: str) -> str:
    """With an environment in which the merge is neither taken for a part of this job nor made an array."""
    environment = {key: value for key, value in environment_outside().items() if key != "SBATCH_ARRAY_INX"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.shares", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", metavar="SCRIPT", help="the batch script of this job")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="its arguments")
    options = parser.parse_args(argv)
    name = Path(options.script).name
    try:
        found = share(os.environ)
        if found is not None and found[0] == 0 and os.environ.get("MERGE", "1") != "0":
            queue_merge(options.script, options.arguments, call_outside)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        why = "MERGE=0 queues no job that merges; the same command without --array merges when all tasks are done"
        print(f"{name}: {' '.join(error.cmd)}: exit status {error.returncode}; {why}", file=sys.stderr)
        return 1
    if found is not None:
        print(f"{found[0]}/{found[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
