"""Shares of a Slurm array: each task has its own, and the first queues the job that merges them, once."""

import json
import os
import subprocess
import sys

import pytest

from training.shares import call_outside, main, share


def array(task: int, first: int, last: int, count: int) -> dict[str, str]:
    values = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in values.items()}


def test_a_task_has_the_share_of_its_number() -> None:
    assert [share(array(task, 0, 2, 3)) for task in range(3)] == [(0, 3), (1, 3), (2, 3)]
    assert share(array(0, 0, 0, 1)) == (0, 1)
    assert share({"SLURM_JOB_ID": "7"}) is None


@pytest.mark.parametrize("numbers", [(3, 3, 3, 1), (5, 0, 9, 3), (0, 0, 6, 4), (1, 1, 8, 8)])
def test_an_array_with_shares_missing_is_refused(numbers: tuple[int, int, int, int]) -> None:
    """--array=3, 0,5,9, 0-6:2 and 1-8."""
    _, first, last, count = numbers
    with pytest.raises(
        ValueError, match=f"^--array: {count} of the tasks {first} to {last}; must be all from 0"
    ) as why:
        share(array(*numbers))
    assert "scontrol requeue JOB_TASK" in str(why.value)
    assert "without --array" in str(why.value)


class Scheduler:
    """Knows the task 12 of array 11, and lists what is submitted."""

    def __init__(self, waiting: str = "") -> None:
        self.waiting = waiting
        self.submitted: list[list[str]] = []

    def __call__(self, *command: str) -> str:
        if command[0] == "squeue":
            assert command == ("squeue", "--noheader", "--name=merge-11")
            return self.waiting
        if command[0] == "scontrol":
            assert command[-1] == "12"
            return "JobId=12 ArrayJobId=11 TimeLimit=1-02:00:00 StdOut=/logs/prepare-11_0.log Partition=main,other"
        self.submitted.append(list(command))
        return "Submitted batch job 13\n"


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    for key in [key for key in os.environ if key.startswith("SLURM")] + ["MERGE"]:
        monkeypatch.delenv(key, raising=False)
    known = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_JOB_PARTITION": "main"}
    for key, value in (known | array(0, 0, 7, 8)).items():
        monkeypatch.setenv(key, value)
    found = Scheduler()
    monkeypatch.setattr("training.shares.call_outside", found)
    return found


GIVEN = ("slurm/prepare.sbatch", "--input", "a b/*.txt", "--output", "x")


def test_the_first_task_queues_the_merge_where_it_went_itself(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ACCOUNT", "mine")
    monkeypatch.setenv("SLURM_JOB_RESERVATION", "week")
    assert main(GIVEN) == 0
    (command,) = scheduler.submitted
    assert command[0] == "sbatch"
    assert sorted(command[1:-5]) == [
        "--account=mine",
        "--dependency=afterok:11",
        "--job-name=merge-11",
        "--kill-on-invalid-dep=yes",
        "--output=/logs/%x.log",
        "--partition=main",
        "--reservation=week",
        "--time=1-02:00:00",
    ]
    assert tuple(command[-5:]) == GIVEN
    assert capsys.readouterr() == ("0/8\n", "Submitted batch job 13\n")


def test_one_that_waits_already_is_enough(scheduler: Scheduler, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler.waiting = "13 main merge-11 me PD 0:00 1 (Dependency)\n"
    assert main(GIVEN) == 0
    assert (scheduler.submitted, capsys.readouterr().out) == ([], "0/8\n")


@pytest.mark.parametrize(("key", "value", "out"), [("SLURM_ARRAY_TASK_ID", "3", "3/8\n"), ("MERGE", "0", "0/8\n")])
def test_the_others_and_who_asks_for_none_queue_none(
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: str,
    out: str,
) -> None:
    monkeypatch.setenv(key, value)
    assert main(GIVEN) == 0
    assert (scheduler.submitted, capsys.readouterr().out) == ([], out)


def test_outside_of_an_array_there_is_neither_share_nor_merge(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert main(GIVEN) == 0
    assert (scheduler.submitted, capsys.readouterr().out) == ([], "")


def test_a_wrong_array_queues_nothing(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "9")
    assert main(GIVEN) == 2
    captured = capsys.readouterr()
    assert (scheduler.submitted, captured.out) == ([], "")
    assert captured.err.startswith("prepare.sbatch: --array: 8 of the tasks 0 to 9; ")


def test_a_merge_that_slurm_refuses_is_said(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*command: str) -> str:
        if command[0] == "sbatch":
            raise subprocess.CalledProcessError(1, command)
        return scheduler(*command)

    monkeypatch.setattr("training.shares.call_outside", refuse)
    assert main(GIVEN) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "exit status 1; MERGE=0 queues no job that merges" in captured.err


def test_the_merge_is_no_part_of_this_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SBATCH_ARRAY_INX", "0-7")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    shown = "import json, os; print(json.dumps(dict(os.environ)))"
    seen = json.loads(call_outside(sys.executable, "-c", shown))
    assert not {"SLURM_ARRAY_TASK_ID", "SBATCH_ARRAY_INX"} & seen.keys()
    assert seen["SBATCH_ACCOUNT"] == "mine"
