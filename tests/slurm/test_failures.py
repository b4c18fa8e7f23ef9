"""What befalls jobs of hours, on a real Slurm: limits, cancelled jobs, dead ranks and nodes, bad nodes."""

import json
import re
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from models.checkpoint import list_checkpoints
from tests.slurm.cluster import Cluster
from tests.slurm.training import PATIENCE, PLAIN, ROOT, Training, resumed

pytestmark = pytest.mark.slow

PIPELINE = ("parallel.pipeline=2",)


def test_a_pipeline_over_two_nodes_gives_the_losses_of_one_process_and_is_evaluated(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path
) -> None:
    """Each checkpoint by a job of its own, one after another; the run by the job of docs/cluster.md."""
    tasks = f"--tasks bits_per_byte --set bits_per_byte.path={ROOT}/README.md"
    training = Training(
        cluster,
        corpus,
        tmp_path,
        *PIPELINE,
        "checkpoint.every=12",
        EVALUATE=tasks,
        EVALUATE_WITH=f"--output={tmp_path}/evaluate-%j.log --hold",
    )
    words = {"--dependency=afterok:JOB": f"--dependency=afterok:{training.number}", "runs/NAME": str(training.run)}
    options = [words[word] if "JOB" in word or "NAME" in word else word for word in after_training()]
    afterwards = cluster.submit(f"--chdir={ROOT}", f"--output={tmp_path}/after.log", *options, *tasks.split(), **PLAIN)
    assert cluster.job(afterwards)["Dependency"].startswith(f"afterok:{training.number}")
    training.finish(alone)
    steps = [path.name for path in list_checkpoints(training.run / "checkpoints")]
    assert steps == ["step_00000012", "step_00000024"]
    assert [line.split()[0] for line in (training.run / "followed.txt").read_text().splitlines()] == steps
    numbers = cluster.run(
        "squeue", "--noheader", "--sort=i", "--format=%A", f"--name=evaluate-{training.number}"
    ).split()
    cluster.run("scontrol", "release", *numbers)  # both at once, with room for both
    jobs = [cluster.wait(int(number), PATIENCE) for number in numbers]
    logs = [(tmp_path / f"evaluate-{number}.log").read_text() for number in numbers]
    assert [job["JobState"] for job in jobs] == ["COMPLETED", "COMPLETED"], logs
    assert jobs[0]["EndTime"] <= jobs[1]["StartTime"], "one after another"
    results = [training.run / "evaluations" / f"{step}.json" for step in steps]
    assert all(f"written to {path}\n" in log for path, log in zip(results, logs, strict=True)), logs
    first, last = (json.loads(path.read_text()) for path in results)
    assert bits(last) < bits(first)
    assert cluster.wait(afterwards, PATIENCE)["JobState"] == "COMPLETED", (tmp_path / "after.log").read_text()
    assert bits(json.loads((training.run / "results.json").read_text())) == bits(last)


def after_training() -> list[str]:
    """Words of the command for an evaluation of a run when it is done."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"sbatch --gpus=1 (--dependency=afterok:JOB .*) --tasks", page)
    return command.split()


def bits(evaluation: dict) -> float:
    return evaluation["results"]["bits_per_byte"]["bits_per_byte"]


def test_the_time_limit_ends_an_allocation_and_not_the_run(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path
) -> None:
    """The limit is drawn near once the run has begun; ranks that stand still, for less than the two
    minutes after which others would give them up, find its signal when they go on."""
    warned = 60  # Slurm may send the signal up to a minute earlier
    training = Training(cluster, corpus, tmp_path, options=("--time=60", f"--signal=USR1@{warned}"), PREFLIGHT="0")
    training.reach(3)
    for rank in training.ranks():
        rank.suspend()
    began = datetime.fromisoformat(training.job["StartTime"]).timestamp()
    minutes = int((time.time() - began + 30) // 60) + 2  # 90 to 150 s from here
    cluster.run("scontrol", "update", f"JobId={training.number}", f"TimeLimit={minutes}")
    time.sleep(max(0.0, began + 60 * minutes - warned - time.time() + 5))
    for rank in training.ranks():
        rank.resume()
    training.requeued()
    assert training.ending["reason"] == "interrupted", training.output()
    assert training.ending["detail"] == "SIGUSR1"
    cluster.run("scontrol", "update", f"JobId={training.number}", "TimeLimit=60")
    training.finish(alone)
    assert resumed(training.run)
    assert training.job["Restarts"] == "1"


def test_a_job_put_back_into_the_queue_saves_first(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path
) -> None:
    training = Training(cluster, corpus, tmp_path, *PIPELINE, PREFLIGHT="0")
    training.reach(3)
    cluster.run("scontrol", "requeue", str(training.number))
    training.requeued()
    training.until(lambda: training.job["JobState"] == "PENDING", "the allocation's end")
    assert training.ending["detail"] == "SIGTERM", training.output()
    training.finish(alone)
    assert resumed(training.run)
    assert training.job["Restarts"] == "1", "queued again by itself as well"


def test_a_cancelled_job_saves_and_stays_cancelled_until_it_is_submitted_again(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path
) -> None:
    training = Training(cluster, corpus, tmp_path, PREFLIGHT="0")
    training.reach(3)
    cluster.run("scancel", str(training.number))
    ended = training.end()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    training.until(lambda: not training.ranks(), "the ranks' end")
    assert training.ending["detail"] == "SIGTERM", training.output()
    training.until(lambda: "Slurm is ending the job" in training.output(), "supervise's word")
    Training(cluster, corpus, tmp_path, PREFLIGHT="0").finish(alone)
    assert resumed(training.run)


@pytest.mark.parametrize(("split", "preflight"), [((), "1"), (PIPELINE, "0")], ids=["data", "pipeline"])
def test_a_killed_rank_is_started_again_in_the_same_allocation(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path, split: tuple[str, ...], preflight: str
) -> None:
    """After another look at the nodes."""
    training = Training(cluster, corpus, tmp_path, *split, PREFLIGHT=preflight)
    training.reach(3)
    training.ranks()[1].kill()
    training.finish(alone)
    assert resumed(training.run)
    assert "supervise: again, in " in training.output()
    assert training.output().count("all-reduce over 2 ranks: ") == 2 * int(preflight)
    assert training.job["Restarts"] == "0"


def test_a_start_that_is_refused_is_the_only_one(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """For a corpus that goes once the configuration has been found to be right."""
    moved = shutil.copytree(corpus, tmp_path / "corpus")
    training = Training(cluster, moved, tmp_path)

    def looking() -> bool:
        found = psutil.process_iter(["cmdline"])
        return any({"parallel.preflight", str(tmp_path)} <= set(one.info["cmdline"] or []) for one in found)

    training.until(looking, "the look at the nodes")
    shutil.rmtree(moved)
    assert training.end()["JobState"] == "FAILED"
    last = training.output().splitlines()[-1]
    assert last.startswith("supervise: failed: failed at step 0: ")
    assert str(moved) in last
    assert training.output().count("supervise: ") == 1
    assert not training.run.exists()


def test_nodes_without_gpus_end_the_job_unless_they_are_asked_for(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    training = Training(cluster, corpus, tmp_path, ON_CPU="0")
    assert training.end()["JobState"] == "FAILED"
    last = training.output().splitlines()[-1]
    assert last.startswith("supervise: failed: pre-flight: torch sees no GPU; ask for GPUs (sbatch --gpus-per-node)")
    assert "(on n0, n1: 2 of 2 nodes)" in last


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_a_lost_node_is_replaced(
    cluster: Cluster, corpus: Path, alone: dict[int, float], tmp_path: Path, which: int
) -> None:
    """The first runs the batch script as well."""
    training = Training(cluster, corpus, tmp_path, PREFLIGHT="0")
    training.reach(3)
    nodes = cluster.hostnames(training.job["NodeList"])
    cluster.kill_node(nodes[which])
    try:
        training.requeued()
        training.finish(alone)
        assert resumed(training.run)
        assert nodes[which] not in cluster.hostnames(training.job["NodeList"])
    finally:
        cluster.start_node(nodes[which])
        cluster.until(lambda: cluster.states()[nodes[which]] == "idle", "the node's return", PATIENCE)


def other_software(directory: Path, node: str) -> str:
    """An interpreter that finds another version of a package on one node."""
    found = directory / "elsewhere" / "sentencepiece-0.0.1.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: sentencepiece\nVersion: 0.0.1\n")
    script = directory / "python"
    script.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = {node} ] && export PYTHONPATH={found.parent}\nexec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_a_bad_node_is_named_and_left_out(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    sizes = ("train.batch_size=6", "train.steps=3", "optimizer.schedule.warmup_steps=1")
    training = Training(
        cluster, corpus, tmp_path, *sizes, options=("--nodes=3",), PYTHON=other_software(tmp_path, "n1")
    )
    assert training.end()["JobState"] == "COMPLETED", training.output()
    said = "n1: sentencepiece 0.0.1, where 2 of 3 nodes have"
    assert training.output().count(f"preflight: {said}") == 1
    assert f"supervise: requeue: pre-flight: {said}" in training.output()
    ended = training.job
    assert ended["ExcNodeList"] == "n1"
    assert cluster.hostnames(ended["NodeList"]) == ["n0", "n2", "n3"]
    assert training.ending["reason"] == "finished"


def test_nodes_of_which_none_is_in_the_right_end_the_job(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    training = Training(cluster, corpus, tmp_path, PYTHON=other_software(tmp_path, "n1"))
    assert training.end()["JobState"] == "FAILED"
    assert "preflight: sentencepiece differs: " in training.output()
    assert "supervise: failed: pre-flight: sentencepiece differs: " in training.output().splitlines()[-1]
    assert not training.run.exists()
