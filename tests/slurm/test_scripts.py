"""The scripts of slurm/ on a real Slurm of several nodes on this machine: what comes out is what one process makes."""

from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from tests.slurm.cluster import Cluster
from tests.slurm.training import ROOT, Training, resumed
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
