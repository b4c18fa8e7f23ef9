"""The scripts of slurm/ on a real Slurm of several nodes on this machine: what comes out is what one process makes."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.training import CORPUS_FILES, PATIENCE, PLAIN, ROOT, Training, preparation, resumed
from training.lock import hold


def test_two_nodes_give_the_losses_of_one_process(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path
) -> None:
    """Two along the data axis, told to leave on the way, and started again."""
    training = Training(cluster, corpus, tmp_path, PREFLIGHT="0")
    training.reach(3)
    assert training.job["NumCPUs"] == "4", "all cores of both nodes"
    cluster.run("scancel", "--signal=USR1", str(training.number))  # as --signal sends it before the limit
    training.finish(alone)
    assert resumed(training.run)
    assert "supervise: requeue: interrupted at step" in training.output()
    assert training.job["Restarts"] == "1"


def test_what_cannot_be_spread_is_refused_before_anything_starts(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    training = Training(cluster, corpus, tmp_path, "parallel.tensor=4")
    assert training.end()["JobState"] == "FAILED"
    assert "must divide the 2 ranks" in training.output()
    assert not training.run.exists()


def test_a_run_directory_in_use_is_refused_before_anything_starts(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "two"
    run.mkdir()
    with ExitStack() as guard, mock.patch.dict("os.environ", SLURM_JOB_ID="4711"):
        hold(run / ".lock", guard, doing="training")
        training = Training(cluster, corpus, tmp_path)
        assert training.end()["JobState"] == "FAILED"
        assert "of job 4711" in training.output()
        assert "torch" not in training.output()
        assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_script_without_arguments_or_interpreter_says_what_it_takes(cluster: Cluster, tmp_path: Path) -> None:
    jobs = {}
    for name in ("train", "prepare", "eval"):
        for case, arguments, variables in (("bare", [], {}), ("no_python", ["x", "y"], {"PYTHON": "bin/nowhere"})):
            log = tmp_path / f"{name}_{case}.log"
            options = [f"--chdir={ROOT}", f"--output={log}"]
            jobs[log] = cluster.submit(*options, f"slurm/{name}.sbatch", *arguments, **variables)
    for log, number in jobs.items():
        assert cluster.wait(number, 60)["ExitCode"] == "2:0"
        name, _, case = log.stem.partition("_")
        assert log.read_text().startswith(f"{name}.sbatch: {'no ' if case == 'bare' else 'PYTHON: bin/nowhere '}")


def bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as no Slurm would, with nothing of this process's own job."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    command = ["bash", f"slurm/{script}.sbatch", *arguments]
    environment = outside | {"PYTHON": sys.executable} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", ["train", "prepare", "eval"])
def test_a_script_that_sbatch_did_not_start_says_so(script: str) -> None:
    done = bash(script, "nothing", "--tasks", "nothing")
    assert done.returncode != 0
    assert done.stderr.endswith("SLURM_SUBMIT_DIR: is not set: start this script with sbatch\n")


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("train", "RANKS_PER_NODE", "08"),
        ("train", "MAX_STANDSTILL", "-1"),
        ("prepare", "WORKERS", "x"),
        ("eval", "RESULTS", "/no/x"),
    ],
)
def test_a_wrong_variable_is_refused_before_anything_else_is(script: str, name: str, value: str) -> None:
    """Neither the arguments are looked at nor Slurm is asked."""
    done = bash(script, "nothing", "--tasks", "nothing", SLURM_SUBMIT_DIR=str(ROOT), **{name: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}.sbatch: {name}: {value!r}; must be ")
    assert "configs.show" not in done.stderr


def test_evaluations_that_cannot_be_and_arrays_with_a_share_missing_are_refused(
    cluster: Cluster, tmp_path: Path
) -> None:
    wrong = "--tasks bits_per_byte --set bits_per_byte.path=nowhere"
    evaluations = {"EVALUATE": wrong, "EVALUATE_WITH": "--partition=nowhere"}
    given = (f"--chdir={ROOT}", f"--output={tmp_path}/%j.log")
    train = cluster.submit(*given, "slurm/train.sbatch", "x", **PLAIN | evaluations)
    prepare = cluster.submit(*given, "--array=3", "slurm/prepare.sbatch", "x")
    said = {}
    for number in (train, prepare):
        assert cluster.wait(number, PATIENCE)["ExitCode"] == "2:0"
        said[number] = (tmp_path / f"{number}.log").read_text().splitlines()
    tasks, options = said[train]
    assert tasks.startswith(f"train.sbatch: EVALUATE: {wrong!r}; must be options of python -m eval (")
    assert "bits_per_byte.path: 'nowhere'; must be a file" in tasks
    assert options.startswith("train.sbatch: EVALUATE_WITH: '--partition=nowhere'; must be options with which sbatch")
    assert "invalid partition specified: nowhere" in options
    (array,) = said[prepare]
    assert array.startswith("prepare.sbatch: --array: 1 of the tasks 3 to 3; must be all from 0")


def test_an_array_prepares_what_one_process_does(cluster: Cluster, texts: Path, corpus: Path, tmp_path: Path) -> None:
    """One task is killed on its way and queued again: it keeps its share, and queues no second merge."""
    output = tmp_path / "corpus"
    options = ["--array=0-7", f"--chdir={ROOT}", f"--output={tmp_path}/%A_%a.log"]
    number = cluster.submit(*options, "slurm/prepare.sbatch", *preparation(texts, output), WORKERS="1", **PLAIN)
    first = tmp_path / f"{number}_0.log"
    cluster.until(lambda: first.exists() and "Submitted batch job" in first.read_text(), "the queued merge", PATIENCE)
    cluster.run("scontrol", "requeue", f"{number}_0")

    def merged() -> bool:
        cluster.hasten_all()
        return (output / "meta.json").exists()

    cluster.until(merged, "the merged corpus", PATIENCE)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    for name in CORPUS_FILES:
        assert (output / name).read_bytes() == (corpus / name).read_bytes(), logs
    assert "REQUEUE" in logs
    assert "shard 0 of 8 is done" in first.read_text()
    merges = cluster.run("squeue", "--noheader", "--states=all", f"--name=merge-{number}").splitlines()
    assert len(merges) == 1, merges
