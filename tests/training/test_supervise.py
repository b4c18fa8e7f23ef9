"""What a batch job does after training: each way to end has its answer, and nothing goes on for ever."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from training.ending import write_ending
from training.supervise import Decision, Standstill, decide, main, resubmission, supervise

FRESH = Standstill()


def ending(reason: str, *, resumable: bool = True) -> dict[str, Any]:
    return {"reason": reason, "detail": "why", "step": 10, "resumable": resumable, "time": 0.0}


def test_each_end_has_its_answer() -> None:
    assert decide(ending("finished", resumable=False), None, 10, FRESH, 5).answer == "done"
    assert decide(ending("interrupted"), None, 10, FRESH, 5).answer == "requeue"
    assert decide(ending("failed"), None, 10, FRESH, 5).answer == "again"
    assert decide(ending("failed", resumable=False), None, 10, FRESH, 5).answer == "failed"
    assert decide(None, None, 10, FRESH, 5).answer == "again"
    bad = {"bad": {"n3": ["slow"], "n1": ["old torch"]}, "unequal": []}
    found = decide(None, bad, 10, FRESH, 5)
    assert (found.answer, found.exclude) == ("resubmit", ("n1", "n3"))
    assert "n3: slow" in found.why
    found = decide(None, {"bad": {}, "unequal": ["torch differs"]}, 10, FRESH, 5)
    assert (found.answer, found.why) == ("failed", "pre-flight: torch differs")


@pytest.mark.parametrize("how", ["interrupted", "failed", None])
def test_starts_that_get_no_further_are_bounded(how: str | None) -> None:
    told = ending(how) if how else None
    before, answers = Standstill(2, 100), []
    for _ in range(3):
        decision = decide(told, None, 100, before, 5)
        before = decision.standstill
        answers.append(decision.answer)
    assert answers == [answers[0]] * 3
    assert answers[0] != "failed"
    decision = decide(told, None, 100, before, 5)
    assert decision.answer == "failed"
    assert "6 starts in a row got no further" in decision.why
    assert decide(told, None, 101, before, 5).standstill == Standstill(0, 101), "a later checkpoint counts as progress"


def test_each_crash_waits_longer_up_to_ten_minutes() -> None:
    pauses = [Decision("again", "", Standstill(count)).pause for count in range(1, 10)]
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert Decision("requeue", "", Standstill(3)).pause == 0


def test_a_job_like_this_one_is_submitted_without_the_nodes() -> None:
    shown = {
        "JobId": "7",
        "JobName": "rondo",
        "NumNodes": "8-8",
        "TimeLimit": "1-00:00:00",
        "Partition": "main",
        "Account": "(null)",
        "QOS": "high",
        "ExcNodeList": "n9",
        "TresPerNode": "gres:gpu:8",
        "StdOut": "/logs/rondo-7.log",
        "Command": "/x/slurm/train.sbatch train.steps=5",
    }
    command = resubmission(shown, ["n1", "n3"])
    assert command[0] == "sbatch"
    assert command[-2:] == ["/x/slurm/train.sbatch", "train.steps=5"]
    assert {"--exclude=n1,n3,n9", "--nodes=8", "--gres=gpu:8", "--dependency=afterany:7", "--qos=high"} < set(command)
    assert not any("null" in word for word in command)


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    latest = run / "checkpoints" / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(f"step_{step:08d}")


def never(*command: str) -> str:
    raise AssertionError(f"called {command}")


def test_an_ending_of_an_earlier_start_is_not_taken_for_this_one_s(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    write_ending(tmp_path, "finished", "all steps", step=10, resumable=False)
    assert supervise(tmp_path, 0.0, None, 5, never).answer == "done"
    found = supervise(tmp_path, time.time() + 1, None, 5, never)
    assert (found.answer, found.why) == ("again", "killed, or never started")


def test_the_count_is_kept_between_starts(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    counts = [supervise(tmp_path, 0.0, None, 5, never).standstill.count for _ in range(3)]
    assert counts == [0, 1, 2]
    checkpoint(tmp_path, 20)
    assert supervise(tmp_path, 0.0, None, 5, never).standstill.count == 0


def test_bad_nodes_are_left_out_by_a_new_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    report = tmp_path / "preflight.json"
    report.write_text(json.dumps({"bad": {"n1": ["slow"]}, "unequal": []}))
    called: list[tuple[str, ...]] = []

    def call(*command: str) -> str:
        called.append(command)
        return "JobId=7 JobName=rondo NumNodes=2 TimeLimit=60 Partition=main StdOut=/log Command=/train.sbatch"

    assert supervise(tmp_path / "run", 0.0, report, 5, call).answer == "resubmit"
    assert called[0][:4] == ("scontrol", "--oneliner", "show", "job")
    assert "--exclude=n1" in called[1]
    assert len(called) == 2


def test_the_command_answers_with_one_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ending(tmp_path, "failed", "the corpus is gone", step=3, resumable=False)
    assert main([str(tmp_path), "--since", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "failed\n"
    assert "the corpus is gone" in captured.err
