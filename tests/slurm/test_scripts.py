"""The scripts of slurm/ on a real Slurm of two nodes on this machine: what comes out is what one process makes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from models.checkpoint import list_checkpoints
from tests.slurm.cluster import Cluster, missing, running_cluster

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "tests" / "assets"
STEPS = 40
PLAIN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm can be started here: {missing()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files, a part of the preparation each."""
    directory = tmp_path_factory.mktemp("texts")
    paragraphs = [
        " ".join(p.split()) for p in (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n") if p.strip()
    ]
    for i in range(8):
        lines = [json.dumps({"text": f"{i}: {paragraph}"}) for paragraph in paragraphs]
        content = "".join(f"{line}\n" for line in lines)
        (directory / f"{i}.jsonl").write_text(content * (2**20 // len(content) + 1), encoding="utf-8")
    return directory


def preparation(texts: Path, output: Path) -> list[str]:
    tokenizer = str(ASSETS / "tokenizer.model")
    return ["--input", f"{texts}/*.jsonl", "--tokenizer", tokenizer, "--valid-fraction", "0.1", "--output", str(output)]


@pytest.fixture(scope="module")
def corpus(texts: Path) -> Path:
    """What one process prepares."""
    command = [sys.executable, "-m", "data.prepare", *preparation(texts, texts / "whole"), "--workers", "1"]
    subprocess.run(command, cwd=ROOT, env=os.environ | PLAIN, capture_output=True, check=True, timeout=300)
    return texts / "whole"


def settings(corpus: Path, runs: Path, name: str) -> list[str]:
    lists = ["eval.prompts=[]", "optimizer.schedule.warmup_steps=3", f"train.steps={STEPS}", "checkpoint.every=5"]
    return [f"log.directory={runs}", f"name={name}", f"data.corpora=[{{path: {corpus}}}]", *lists]


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process."""
    runs = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "train.py", str(ASSETS / "tiny.yaml"), *settings(corpus, runs, "one")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | PLAIN, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return losses(runs / "one")


class Training:
    """A submitted job of slurm/train.sbatch on two nodes, and its run."""

    def __init__(self, cluster: Cluster, corpus: Path, runs: Path, *overrides: str, **variables: str) -> None:
        self.cluster, self.run, self.log = cluster, runs / "two", runs / "job.log"
        arguments = [str(ASSETS / "tiny.yaml"), *settings(corpus, runs, "two"), *overrides]
        options = ["--nodes=2", f"--chdir={ROOT}", f"--output={self.log}"]
        self.number = cluster.submit(*options, "slurm/train.sbatch", *arguments, **PLAIN | variables)

    def reach(self, step: int, seconds: float = 120) -> None:
        self.until(lambda: max(losses(self.run), default=0) >= step, f"step {step}", seconds)

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 120) -> None:
        try:
            self.cluster.until(holds, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- job\n{self.output()}") from None

    def requeued(self) -> None:
        """Waits until the job stands in the queue again, and lets it start at once."""
        self.until(
            lambda: int(self.job["Restarts"]) > 0 and self.job["JobState"] in ("PENDING", "RUNNING"), "a requeue"
        )
        if self.job["JobState"] == "PENDING":
            self.cluster.hasten(self.number)

    @property
    def job(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def finish(self, alone: dict[int, float]) -> None:
        """Waits for the end, and holds every loss against those of one process."""
        ended = self.cluster.wait(self.number, 180)
        assert ended["JobState"] == "COMPLETED", self.output()
        assert json.loads((self.run / "exit.json").read_text())["reason"] == "finished"
        found = losses(self.run)
        assert sorted(found) == sorted(alone)
        assert found == pytest.approx(alone, rel=1e-4), self.output()

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else "no log"

    def ranks(self) -> list[psutil.Process]:
        marked = f"log.directory={self.run.parent}"
        found = [p for p in psutil.process_iter(["cmdline"]) if marked in (p.info["cmdline"] or [])]
        return [
            p for p in found if "train.py" in p.info["cmdline"] and "torch.distributed.run" not in p.info["cmdline"]
        ]


def test_an_array_prepares_what_one_process_does(cluster: Cluster, texts: Path, corpus: Path, tmp_path: Path) -> None:
    """One task is killed on its way and queued again."""
    output = tmp_path / "corpus"
    options = ["--array=0-7", f"--chdir={ROOT}", f"--output={tmp_path}/%A_%a.log"]
    number = cluster.submit(*options, "slurm/prepare.sbatch", *preparation(texts, output), WORKERS="1", **PLAIN)
    cluster.until(lambda: cluster.job(number)["JobState"] == "RUNNING", "the array's first task", 60)
    cluster.run("scontrol", "requeue", f"{number}_0")

    def merged() -> bool:
        cluster.hasten_all()
        return (output / "meta.json").exists()

    cluster.until(merged, "the merged corpus", 240)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx"):
        assert (output / name).read_bytes() == (corpus / name).read_bytes(), logs
    assert "REQUEUE" in logs


def test_two_nodes_give_the_losses_of_one_process(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path
) -> None:
    """With the look at the nodes before, and an evaluation of each checkpoint after."""
    training = Training(
        cluster, corpus, tmp_path, EVALUATE="bits_per_byte", EVALUATE_WITH=f"--output={tmp_path}/eval-%j.log"
    )
    training.finish(alone)
    assert "TFLOP/s" in training.output(), "no pre-flight check"
    steps = [path.name for path in list_checkpoints(training.run / "checkpoints")]
    assert (training.run / "followed.txt").read_text().split()[-1] == max(steps)


def test_a_run_is_requeued_when_its_time_is_over(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path
) -> None:
    training = Training(cluster, corpus, tmp_path, PREFLIGHT="0")
    training.reach(3)
    cluster.run("scancel", "--signal=USR1", str(training.number))  # as --signal sends it before the limit
    training.requeued()
    training.finish(alone)
    assert re.search(r"supervise: requeue: interrupted at step \d+: SIGUSR1", training.output())


def test_a_killed_rank_is_survived(cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path) -> None:
    training = Training(cluster, corpus, tmp_path, PREFLIGHT="0")
    training.reach(7)
    training.ranks()[1].kill()
    training.finish(alone)
    assert "supervise: again" in training.output()


def test_what_cannot_be_spread_is_refused_before_anything_starts(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    training = Training(cluster, corpus, tmp_path, "parallel.tensor=4")
    ended = cluster.wait(training.number, 60)
    assert ended["JobState"] == "FAILED"
    assert "must divide the 2 ranks" in training.output()
    assert not training.run.exists()


def test_a_script_without_arguments_says_what_it_takes(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("train", "prepare", "eval"):
        number = cluster.submit(f"--chdir={ROOT}", f"--output={tmp_path}/{name}.log", f"slurm/{name}.sbatch")
        assert cluster.wait(number, 60)["ExitCode"] == "2:0"
        assert f"{name}.sbatch: " in (tmp_path / f"{name}.log").read_text()
