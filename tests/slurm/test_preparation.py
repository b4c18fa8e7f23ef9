"""slurm/prepare.sbatch on a real Slurm, of which a task fails for good: what is left to do, and who does it."""

from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.training import CORPUS_FILES, PATIENCE, PLAIN, ROOT, preparation

pytestmark = pytest.mark.slow


def test_a_killed_task_is_run_again(cluster: Cluster, texts: Path, corpus: Path, tmp_path: Path) -> None:
    """The merge waits for all; a task that was killed and run again leaves nothing else to do than merging."""
    output, log = tmp_path / "corpus", f"--output={tmp_path}/%A_%a.log"
    arguments = ["slurm/prepare.sbatch", *preparation(texts, output)]
    number = cluster.submit("--array=0-7", f"--chdir={ROOT}", log, *arguments, WORKERS="1", **PLAIN)

    def task() -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [one for one in found if {"data.prepare", "3/8", str(output)} <= set(one.info["cmdline"] or [])]

    cluster.until(lambda: bool(task()), "task 3", PATIENCE)
    for process in task():
        process.kill()
    cluster.until(lambda: cluster.job(f"{number}_3")["JobState"] == "FAILED", "task 3's failure", PATIENCE)
    merges = ("squeue", "--noheader", f"--name=merge-{number}")
    cluster.until(lambda: not cluster.run(*merges), "the end of the merge", PATIENCE)
    assert not (output / "meta.json").exists()
    cluster.run("scontrol", "requeue", f"{number}_3")

    def done() -> bool:
        cluster.hasten_all()
        return cluster.job(f"{number}_3")["JobState"] == "COMPLETED"

    cluster.until(done, "task 3 once more", PATIENCE)
    again = cluster.submit(f"--chdir={ROOT}", f"--output={tmp_path}/merge.log", *arguments, WORKERS="1", **PLAIN)
    assert cluster.wait(again, PATIENCE)["JobState"] == "COMPLETED", (tmp_path / "merge.log").read_text()
    assert "encoding: 100%|██████████| 8/8 [00:00" in (tmp_path / "merge.log").read_text()
    for name in CORPUS_FILES:
        assert (output / name).read_bytes() == (corpus / name).read_bytes()
