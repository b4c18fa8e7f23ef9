"""What a batch job does after training: each way to end has its answer, and nothing goes on for ever."""

import json
import subprocess
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import training.supervise as supervise_module
from training.ending import write_ending
from training.jobs import environment_outside
from training.lock import hold
from training.run_directory import tell_of_refusal
from training.supervise import Decision, Outcome, Standstill, decide, main, occupied, put_back, supervise

FRESH = Standstill()


def ending(reason: str, *, resumable: bool = True) -> dict[str, Any]:
    return {"reason": reason, "detail": "why", "step": 10, "resumable": resumable, "time": 0.0}


def test_each_end_has_its_answer() -> None:
    assert decide(Outcome(ending("finished", resumable=False), saved=10), FRESH, 5).answer == "done"
    assert decide(Outcome(ending("interrupted"), saved=10), FRESH, 5).answer == "requeue"
    assert decide(Outcome(ending("failed"), saved=10), FRESH, 5).answer == "again"
    assert decide(Outcome(ending("failed", resumable=False), saved=10), FRESH, 5).answer == "failed"
    assert decide(Outcome(None, saved=10), FRESH, 5).answer == "again"
    bad = {"bad": {"n3": ["slow"], "n1": ["old torch"]}, "unequal": ["n4 and n5 differ"], "asked": []}
    found = decide(Outcome(None, bad, saved=10), FRESH, 5)
    assert (found.answer, found.exclude) == ("requeue", ("n1", "n3"))
    assert "n3: slow" in found.why
    found = decide(Outcome(None, {"bad": {}, "unequal": ["torch differs"], "asked": []}, saved=10), FRESH, 5)
    assert (found.answer, found.why) == ("failed", "pre-flight: torch differs")
    found = decide(Outcome(None, bad | {"asked": ["9 ranks, 8 GPUs"]}, saved=10), FRESH, 5)
    assert (found.answer, found.why) == ("failed", "pre-flight: 9 ranks, 8 GPUs"), "on other nodes as well"


@pytest.mark.parametrize("how", ["interrupted", "failed", None])
def test_starts_that_get_no_further_are_bounded(how: str | None) -> None:
    told = ending(how) if how else None
    before, answers = Standstill(2, 100), []
    for _ in range(3):
        decision = decide(Outcome(told, saved=100), before, 5)
        before = decision.standstill
        answers.append(decision.answer)
    assert answers == [answers[0]] * 3
    assert answers[0] != "failed"
    decision = decide(Outcome(told, saved=100), before, 5)
    assert decision.answer == "failed"
    assert "6 starts in a row got no further" in decision.why
    further = decide(Outcome(told, saved=101), before, 5).standstill
    assert (further.count, further.step) == (0, 101), "a later checkpoint counts as progress"


def test_crashes_of_a_day_are_bounded_whatever_the_run_gains_between_them() -> None:
    before, answers = FRESH, []
    for i in range(25):
        decision = decide(Outcome(ending("failed"), saved=10 * i, now=3599.0 * i), before)
        before = decision.standstill
        answers.append(decision.answer)
    assert answers == ["again"] * 24 + ["failed"]
    assert decision.why.startswith("25 crashes within a day; the last: failed at step 10: ")
    before = FRESH
    for i in range(100):
        told = ending("failed") if i % 2 else None
        decision = decide(Outcome(told, saved=10 * i, now=3601.0 * i), before)
        before = decision.standstill
        assert decision.answer == "again", "one an hour"
    told = decide(Outcome(ending("interrupted"), saved=1000, now=3601.0 * 100), before)
    assert told.standstill.crashes == before.crashes, "no crash"
    assert decide(Outcome(None, saved=10), FRESH, max_crashes=0).answer == "failed"


def test_each_crash_waits_longer_up_to_ten_minutes() -> None:
    pauses = [Decision("again", "", Standstill(count)).pause for count in range(1, 10)]
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert Decision("requeue", "", Standstill(3)).pause == 0


def test_a_crash_shortly_before_the_time_limit_is_started_anew_in_another_allocation() -> None:
    found = decide(Outcome(ending("failed"), saved=10, left=630.0), Standstill(2, 10), 5)
    assert (found.answer, found.pause) == ("requeue", 0)
    assert "630 s of the allocation are left" in found.why
    assert decide(Outcome(None, saved=10, left=650.0), Standstill(2, 10), 5).answer == "again"
    assert decide(Outcome(ending("failed", resumable=False), saved=10, left=1.0), FRESH, 5).answer == "failed"
    assert decide(Outcome(ending("failed"), saved=10, left=1.0), Standstill(5, 10), 5).answer == "failed"


def test_a_start_that_makes_no_run_is_tried_once_more() -> None:
    """The second would find its way into the next allocation, and all that follow."""
    first = decide(Outcome(None, has_run=False, left=100.0), Standstill(count=3), 5)
    assert (first.answer, first.standstill.without_run) == ("again", 1), "after bad nodes"
    found = decide(Outcome(None, has_run=False, left=100.0), first.standstill, 5)
    said = "2 starts made no run; the last: killed, or never started; more stands further up"
    assert (found.answer, found.why) == ("failed", said)


def test_a_refused_start_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that does not exist, and of one that does; what another job was refused for is not this one's."""
    run = tmp_path / "runs" / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    tell_of_refusal(run, "train.batch_size: 6; must divide")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert supervise(run, 0.0, None, 5, never).answer == "again"
    tell_of_refusal(run, "train.batch_size: 6; must divide")
    found = supervise(run, 0.0, None, 5, never)
    assert (found.answer, found.why) == ("failed", "failed at step 0: train.batch_size: 6; must divide")
    assert supervise(run, time.time() + 1, None, 5, never).answer == "again", "an earlier start's"
    checkpoint(run, 10)
    assert supervise(run, 0.0, None, 5, never).answer == "again", "it was a start before there was a run"
    write_ending(run, "interrupted", "SIGTERM", step=10, resumable=True)
    tell_of_refusal(run, "train.precision: fp16")
    found = supervise(run, 0.0, None, 5, never)
    assert (found.answer, found.why) == ("failed", "failed at step 0: train.precision: fp16")


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    latest = run / "checkpoints" / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(f"step_{step:08d}")
    (run / "config.yaml").write_text("")


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def never(*command: str) -> str:
    raise AssertionError(f"called {command}")


class Scheduler:
    """Says of job 7 what it is told to, and lists what else is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **job: str) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        shown = {"JobId": "7", "JobState": "RUNNING", "TimeLimit": "UNLIMITED", "EndTime": "Unknown"} | job
        self.shown = " ".join(f"{key}={value}" for key, value in shown.items())
        self.asked: list[str] = []
        monkeypatch.setattr("training.supervise.call", self)
        monkeypatch.setattr("signal.signal", lambda *of: None)

    def __call__(self, *command: str) -> str:
        if command[1:] == ("--oneliner", "show", "job", "7"):
            return self.shown
        self.asked.append(" ".join(command))
        return ""


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
    now = time.time()
    crashes = supervise(tmp_path, 0.0, None, 5, never).standstill.crashes
    assert [now - 60 < when <= time.time() for when in crashes] == [True] * 5
    assert supervise(tmp_path, 0.0, None, 5, never, max_crashes=5).answer == "failed"


def test_bad_nodes_before_there_is_a_run_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, report = tmp_path / "runs" / "run", tmp_path / "preflight.json"
    report.write_text(json.dumps({"bad": {"n1": ["slow"]}, "unequal": [], "asked": []}))
    scheduler = Scheduler(monkeypatch)
    found = [supervise(run, 0.0, report, 5, scheduler) for _ in range(7)]
    assert [one.answer for one in found] == ["requeue"] * 5 + ["failed", "requeue"], "anew once somebody was told"
    assert found[5].why == "6 starts in a row got no further; the last: pre-flight: n1: slow"
    assert [path.name for path in run.parent.iterdir()] == [".run.standstill.json"]
    checkpoint(run, 10)
    assert supervise(run, 0.0, report, 5, scheduler).standstill.count == 0
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_where_starts_cannot_be_counted_none_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the directory that pre-flight could not write its report into."""
    (tmp_path / "runs").write_text("a file")
    found = supervise(tmp_path / "runs" / "run", 0.0, None, 5, Scheduler(monkeypatch))
    assert found.answer == "failed"
    assert "so that starts cannot be counted; name another log.directory" in found.why


def test_bad_nodes_are_left_out_when_the_job_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "preflight.json"
    report.write_text(json.dumps({"bad": {"n1": ["slow"]}, "unequal": [], "asked": []}))
    scheduler = Scheduler(monkeypatch, ExcNodeList="n9")
    assert main([str(tmp_path / "run"), "--since", "0", "--preflight", str(report)]) == 0
    assert scheduler.asked == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n9,n1"]
    assert capsys.readouterr().out == "over\n"


def test_an_interrupted_job_is_queued_again_unless_somebody_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, 10)
    write_ending(tmp_path, "interrupted", "SIGTERM", step=10, resumable=True)
    scheduler = Scheduler(monkeypatch, ExcNodeList="(null)")
    main([str(tmp_path), "--since", "0"])
    assert scheduler.asked == ["scontrol requeue 7"]
    for state in ("CANCELLED", "COMPLETING", "PREEMPTED"):
        scheduler = Scheduler(monkeypatch, JobState=state)
        found = supervise(tmp_path, 0.0, None, 5, scheduler)
        assert (found.answer, scheduler.asked) == ("over", [])
        assert state in found.why


def test_a_job_that_cannot_be_queued_again_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ending(tmp_path, "interrupted", "SIGTERM", step=10, resumable=True)
    scheduler = Scheduler(monkeypatch)

    def refuse(*command: str) -> str:
        if command[1] == "requeue":
            raise subprocess.CalledProcessError(1, command)
        return scheduler(*command)

    monkeypatch.setattr("training.supervise.call", refuse)
    main([str(tmp_path), "--since", "0"])
    captured = capsys.readouterr()
    assert captured.out == "failed\n"
    assert "submit it without --no-requeue" in captured.err


def fails(times: int, which: str, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the first `times` commands that hold the word `which` fail; returns the list of those."""
    failed: list[str] = []

    def call(*command: str) -> str:
        if which in command and len(failed) < times:
            failed.append(" ".join(command))
            raise subprocess.CalledProcessError(1, command)
        return scheduler(*command)

    monkeypatch.setattr("training.supervise.call", call)
    monkeypatch.setattr("training.jobs.time.sleep", lambda seconds: None)
    monkeypatch.setattr("training.supervise.time.sleep", lambda seconds: None)
    return failed


def test_a_scheduler_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, 10)
    write_ending(tmp_path, "interrupted", "SIGTERM", step=10, resumable=True)
    scheduler = Scheduler(monkeypatch)
    failed = fails(12, "show", scheduler, monkeypatch)
    main([str(tmp_path), "--since", "0"])
    assert (len(failed), scheduler.asked) == (12, ["scontrol requeue 7"])
    assert capsys.readouterr().out == "over\n"
    fails(10**6, "show", scheduler, monkeypatch)
    main([str(tmp_path), "--since", "0"])
    said = capsys.readouterr()
    assert (said.out, scheduler.asked) == ("failed\n", ["scontrol requeue 7"])
    assert "submit it once more" in said.err
    (tmp_path / "exit.json").unlink()
    main([str(tmp_path), "--since", "0"])
    said = capsys.readouterr()
    assert said.out == "again\n", "srun waits for it as well"
    assert "Slurm does not answer" in said.err
    write_ending(tmp_path, "finished", "", step=10, resumable=False)
    monkeypatch.setattr("training.supervise.call", never)
    main([str(tmp_path), "--since", "0"])
    assert capsys.readouterr().out == "done\n"


def test_a_requeue_whose_answer_is_lost_is_asked_for_again_unless_it_was_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler(monkeypatch)
    fails(1, "requeue", scheduler, monkeypatch)
    assert put_back([], supervise_module.call) == "over"
    assert scheduler.asked == ["scontrol requeue 7"]
    scheduler = Scheduler(monkeypatch, JobState="PENDING")
    fails(1, "requeue", scheduler, monkeypatch)
    assert put_back([], supervise_module.call) == "over"
    assert scheduler.asked == []
    assert capsys.readouterr().err == ""


def test_a_queued_job_that_may_get_a_bad_node_again_has_not_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler(monkeypatch)
    fails(2, "ExcNodeList=n1", scheduler, monkeypatch)
    assert put_back(["n1"], supervise_module.call) == "over"
    assert scheduler.asked == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n1"]
    assert capsys.readouterr().err == ""
    fails(3, "ExcNodeList=n1", scheduler, monkeypatch)
    assert put_back(["n1"], supervise_module.call) == "over"
    said = capsys.readouterr().err
    assert "scontrol update JobId=7 ExcNodeList=n1: exit status 1; the job is in the queue, but may get" in said


def test_outside_of_slurm_the_launcher_is_told_to_queue_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, 10)
    write_ending(tmp_path, "interrupted", "SIGTERM", step=10, resumable=True)
    main([str(tmp_path), "--since", "0"])
    assert capsys.readouterr().out == "requeue\n"
    report = tmp_path / "preflight.json"
    report.write_text(json.dumps({"bad": {"n3": ["slow"], "n1": ["slow"]}, "unequal": [], "asked": []}))
    main([str(tmp_path), "--since", "0", "--preflight", str(report)])
    assert capsys.readouterr().out == "requeue n1 n3\n"


def test_the_time_left_is_read_from_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 10)
    soon = datetime.fromtimestamp(time.time() + 100).isoformat(timespec="seconds")
    scheduler = Scheduler(monkeypatch, TimeLimit="02:00:00", EndTime=soon)
    assert supervise(tmp_path, 0.0, None, 5, scheduler).answer == "requeue"
    later = datetime.fromtimestamp(time.time() + 5000).isoformat(timespec="seconds")
    assert (
        supervise(tmp_path, 0.0, None, 5, Scheduler(monkeypatch, TimeLimit="02:00:00", EndTime=later)).answer == "again"
    )


def test_a_run_directory_in_use_is_refused_before_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "run"), "--before"]) == 0
    assert not (tmp_path / "run").exists()
    assert main([str(tmp_path), "--before"]) == 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with ExitStack() as guard:
        hold(tmp_path / ".lock", guard, doing="training")
        assert occupied(tmp_path) is None, "what is left of this very job"
        monkeypatch.delenv("SLURM_JOB_ID")
        assert main([str(tmp_path), "--before"]) == 1
        assert "of job 4711" in capsys.readouterr().err
        assert supervise(tmp_path, 0.0, None, 5, never).answer == "failed"
        assert not (tmp_path / "standstill.json").exists(), "another job's count"
    assert main([str(tmp_path), "--before"]) == 0


def test_what_a_job_submits_sees_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "8")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_CONF", "/somewhere")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    environment = environment_outside()
    assert "SLURM_GPUS_PER_NODE" not in environment
    assert "SLURMD_NODENAME" not in environment
    assert environment["SLURM_CONF"] == "/somewhere"
    assert environment["SBATCH_ACCOUNT"] == "mine"


def test_the_command_answers_with_one_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ending(tmp_path, "failed", "the corpus is gone", step=3, resumable=False)
    assert main([str(tmp_path), "--since", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "failed\n"
    assert "the corpus is gone" in captured.err
