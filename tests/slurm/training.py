"""Commands of the tests, and a training job of two nodes on their cluster."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.slurm.cluster import Cluster, free_ports
from training.supervise import saved_step

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "tests" / "assets"
PLAIN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
STEPS = 24
CORPUS_FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx")
PATIENCE = 600
"""Seconds for what takes half a minute on a quiet machine."""


def settings(corpus: Path, runs: Path, name: str) -> list[str]:
    lists = ["eval.prompts=[]", "eval.every=null", f"train.steps={STEPS}", "checkpoint.every=2"]
    return [f"log.directory={runs}", f"name={name}", f"data.corpora=[{{path: {corpus}}}]", *lists]


def preparation(texts: Path, output: Path) -> list[str]:
    tokenizer = str(ASSETS / "tokenizer.model")
    held_out = ["--valid-fraction", "0.02"]
    return ["--input", f"{texts}/*.jsonl", "--tokenizer", tokenizer, *held_out, "--output", str(output)]


def rows(run: Path) -> list[dict[str, Any]]:
    """Of the run's metrics and events; the last may be half written."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run: Path) -> dict[int, float]:
    """By step; of one that was made twice, the later."""
    return {row["step"]: row["loss"] for row in rows(run) if "loss" in row}


def resumed(run: Path) -> bool:
    """Whether a start has gone on from a checkpoint."""
    return any(row.get("event") == "resumed" for row in rows(run))


class Training:
    """A submitted job of slurm/train.sbatch, and its run.

    Args:
        runs: directory of the run, `two`, and the log.
        overrides: of the configuration.
        options: of sbatch.
        variables: of the environment.
    """

    def __init__(
        self,
        cluster: Cluster,
        corpus: Path,
        runs: Path,
        *overrides: str,
        options: tuple[str, ...] = (),
        **variables: str,
    ) -> None:
        self.cluster, self.run, self.log = cluster, runs / "two", runs / "job.log"
        arguments = [str(ASSETS / "tiny.yaml"), *settings(corpus, runs, "two"), *overrides]
        # Another cluster of tests counts its jobs from 1 as well.
        own = {"RENDEZVOUS_PORT": str(free_ports(1)[0]), "ON_CPU": "1"}
        given = ["--nodes=2", f"--chdir={ROOT}", f"--output={self.log}", *options]
        self.number = cluster.submit(*given, "slurm/train.sbatch", *arguments, **PLAIN | own | variables)

    @property
    def job(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else "no log"

    def until(self, holds: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        try:
            self.cluster.until(holds, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- job\n{self.output()}") from None

    def reach(self, step: int) -> None:
        """Waits until the run has made so many steps, and a checkpoint."""
        self.until(
            lambda: max(losses(self.run), default=0) >= step and saved_step(self.run) is not None, f"step {step}"
        )
        assert self.job["JobState"] == "RUNNING", f"ended before it could be disturbed:\n{self.output()}"

    def requeued(self, times: int = 1) -> None:
        """Waits until the job has been put back into the queue so many times."""
        self.until(lambda: int(self.job["Restarts"]) >= times, f"requeue {times}")

    def end(self) -> dict[str, str]:
        """Waits for the end, without Slurm's two minutes before each further start."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def ended() -> bool:
            self.cluster.hasten_all()
            return self.job["JobState"] in ends

        self.until(ended, f"the end of job {self.number}")
        return self.job

    def finish(self, alone: dict[int, float]) -> None:
        """Waits for the end, and holds every loss against those of one process."""
        assert self.end()["JobState"] == "COMPLETED", self.output()
        assert self.ending["reason"] == "finished", self.output()
        found = losses(self.run)
        assert sorted(found) == sorted(alone), self.output()
        for step, loss in alone.items():
            assert abs(found[step] - loss) <= 1e-4 * loss, (step, found[step], loss)

    @property
    def ending(self) -> dict[str, str]:
        """Content of exit.json."""
        return json.loads((self.run / "exit.json").read_text())

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, without those that started them."""
        marked = f"log.directory={self.run.parent}"
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if marked in words and "train.py" in words and "torch.distributed.run" not in words:
                found.append(process)
        return found
