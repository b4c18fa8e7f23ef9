"""Runs that go wrong: steps that are no good, ranks that hang or lag, time that runs out, two jobs in one place."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from eval.run_record import read_run
from models.checkpoint import list_checkpoints, read_meta
from tests.faults.job import Job
from tests.test_train import ASSETS, ENVIRONMENT, ROOT, curve, events, metrics, wait_for

NAN = float("nan")
QUIET = ("eval.every=null", "eval.prompts=[]")
SOURCE = ("data.source=synthetic:recall", "data.corpora=[]", "data.sequence_length=24", "model.vocab_size=32")

Scenario = tuple[dict[str, Any], list[str]]


def scenario(runs: Path, name: str, *overrides: str, **faults: Any) -> Scenario:
    """A run of ten steps of eight samples, saved every fifth."""
    arguments = [str(ASSETS / "tiny.yaml"), f"name={name}", f"log.directory={runs}", "checkpoint.every=5"]
    return faults, [*arguments, *SOURCE, *QUIET, *overrides]


def start(scenarios: list[Scenario], *torchrun: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, "tests/faulty_train.py", json.dumps(scenarios)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ending(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "exit.json").read_text(encoding="utf-8"))


def ended(directory: Path) -> tuple[str, int, bool]:
    found = ending(directory)
    return found["reason"], found["step"], found["resumable"]


def details(directory: Path, event: str) -> list[str]:
    return [row["detail"] for row in metrics(directory) if row.get("event") == event]


def exit_codes(output: str) -> list[int]:
    return [int(line.removeprefix("exit code ")) for line in output.splitlines() if line.startswith("exit code ")]


class Outcome:
    """Several runs of one process each: their directories, exit codes and what they said."""

    def __init__(self, runs: Path, scenarios: list[Scenario]) -> None:
        self.codes, self.errors, self.runs = {}, "", runs
        for faults, arguments in scenarios:
            job = Job(arguments, 1, runs, faults=faults)
            (self.codes[arguments[1].removeprefix("name=")],) = job.wait()
            self.errors += job.said()

    def __getitem__(self, name: str) -> Path:
        return self.runs / name


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    runs = tmp_path_factory.mktemp("runs")
    scenarios = [
        scenario(runs, "skips", factor=NAN, samples=[27]),
        scenario(runs, "without-one-batch", skipped=[[24, 31]]),
        scenario(runs, "goes-back", "checkpoint.every=2", "health.skip_around=1", factor=NAN, samples=[27, 32, 47]),
        scenario(runs, "without-five-batches", skipped=[[16, 55]]),
        scenario(runs, "gives-up", "health.max_rollbacks=1", factor=NAN, samples=list(range(40, 1000))),
        scenario(runs, "never-saved", factor=NAN, samples=list(range(8, 1000))),
        scenario(runs, "out-of-time", "train.time_limit_minutes=0.002", "train.save_margin_minutes=0.001"),
    ]
    return Outcome(runs, scenarios)


def test_a_step_that_is_not_finite_is_left_out_and_told(outcome: Outcome) -> None:
    """To the bit the run whose data never held that batch."""
    assert outcome.codes["skips"] == 0, outcome.errors
    assert ("skipped", 4) in events(outcome["skips"])
    assert details(outcome["skips"], "skipped") == [
        "not finite: loss nan, gradient norm inf; samples 24 to 31"
    ] or details(outcome["skips"], "skipped") == ["not finite: loss nan, gradient norm nan; samples 24 to 31"]
    assert curve(outcome["skips"]) == curve(outcome["without-one-batch"])
    progress = read_meta(outcome["skips"] / "checkpoints" / "latest")["progress"]
    assert (progress["consumed_samples"], progress["skipped"]) == (80, [[24, 31]])
    assert ended(outcome["skips"]) == ("finished", 10, False)


def test_several_in_a_row_take_the_run_back(outcome: Outcome) -> None:
    """Three batches that are not finite and one on either side: step 3 is undone, as its batch is left out too."""
    directory = outcome["goes-back"]
    assert outcome.codes["goes-back"] == 0
    order = [(name, step) for name, step in events(directory) if name in ("skipped", "rolled back")]
    assert order == [("skipped", 4), ("skipped", 4), ("skipped", 4), ("rolled back", 2)]
    assert details(directory, "rolled back")[0].endswith(
        "checkpoints/step_00000002; samples left out: 24 to 31, 32 to 39, 40 to 47"
    )
    assert curve(directory) == curve(outcome["without-five-batches"])
    assert read_meta(directory / "checkpoints" / "latest")["progress"]["skipped"] == [[16, 55]]
    assert read_meta(directory / "checkpoints" / "latest")["progress"]["health"]["rollbacks"] == 1


def test_a_run_that_does_not_recover_ends_with_one_error(outcome: Outcome) -> None:
    assert outcome.codes["gives-up"] == outcome.codes["never-saved"] == 1
    for name, step in (("gives-up", 5), ("never-saved", 1)):
        assert events(outcome[name])[-2:] == [("skipped", step + 1), ("failed", step)]
        assert details(outcome[name], "failed") == [ending(outcome[name])["detail"]]
        assert read_run(outcome[name]).status == "failed"
    assert ended(outcome["gives-up"]) == ("failed", 5, False)
    assert ended(outcome["never-saved"]) == ("failed", 1, False)
    lines = [line for line in outcome.errors.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 2
    assert lines[0].startswith(
        "train.py: health.max_rollbacks: 1, all used, and step 6 had to be left out again (samples"
    )
    assert lines[1].startswith(
        "train.py: step 2: left out (samples 8 to 15, 16 to 23, 24 to 31), and there is no checkpoint"
    )
    assert "Traceback" not in outcome.errors


@pytest.mark.slow
def test_a_spike_is_logged_left_out_or_undone(tmp_path: Path) -> None:
    spike = {"factor": 50.0, "samples": [66]}
    spikes = ("health.spike_window=8", "health.spike_score=8")
    scenarios = [
        scenario(tmp_path, "undisturbed", *spikes),
        scenario(tmp_path, "logs-spike", *spikes, **spike),
        scenario(tmp_path, "skips-spike", *spikes, "health.on_spike=skip", **spike),
        scenario(tmp_path, "undoes-spike", *spikes, "health.on_spike=rollback", **spike),
        scenario(tmp_path, "without-the-spike", skipped=[[64, 71]]),
    ]
    outcome = Outcome(tmp_path, scenarios)
    clean = curve(outcome["undisturbed"])
    assert not details(outcome["undisturbed"], "spike")
    logged = curve(outcome["logs-spike"])
    (detail,) = details(outcome["logs-spike"], "spike")
    assert detail.startswith("spike of the loss: loss ")
    assert {step: logged[step] for step in range(1, 9)} == {step: clean[step] for step in range(1, 9)}
    assert logged[9][0] > clean[9][0]
    assert ("skipped", 9) in events(outcome["skips-spike"])
    assert curve(outcome["skips-spike"]) == curve(outcome["without-the-spike"])
    back = [(name, step) for name, step in events(outcome["undoes-spike"]) if name in ("skipped", "rolled back")]
    assert back == [("skipped", 9), ("rolled back", 5)]
    assert curve(outcome["undoes-spike"]) == curve(outcome["without-the-spike"])


def test_the_report_reads_what_happened(outcome: Outcome) -> None:
    record = read_run(outcome["goes-back"])
    assert [row["step"] for row in record.training] == list(range(1, 11))
    assert record.repeated_steps == 1
    assert {"skipped", "rolled back"} <= {row["event"] for row in record.events}


def test_time_that_runs_out_leaves_a_run_to_be_continued(outcome: Outcome) -> None:
    assert outcome.codes["out-of-time"] == 75
    assert events(outcome["out-of-time"])[-1] == ("interrupted", 1)
    assert ended(outcome["out-of-time"]) == ("interrupted", 1, True)
    assert ending(outcome["out-of-time"])["detail"] == "time limit of 0.002 minutes"
    assert [read_meta(path)["step"] for path in list_checkpoints(outcome["out-of-time"] / "checkpoints")] == [1]


def rank_process(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    return next(p for p in ranks if "tests/faulty_train.py" in p.cmdline() and p.environ().get("RANK") == str(rank))


WATCHED = ("health.hang_minutes=0.05", "health.hang_factor=2", "train.steps=100000", "checkpoint.every=100000")


def test_a_rank_that_lags_is_named_and_one_that_hangs_ends_the_job(tmp_path: Path) -> None:
    """Under ranks that each hold half of a batch, one of which is not finite for a step: all leave it out."""
    faults, arguments = scenario(tmp_path, "run", *WATCHED, slow={"1": 0.2}, hang=[1, 12], factor=NAN, samples=[27])
    job = Job(arguments, 2, tmp_path, faults=faults)
    assert job.wait() == [1, 1], "each ends by itself"
    errors, directory = job.said(), tmp_path / "run"
    rows = [row for row in metrics(directory) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 11)), "twelve steps, of which one was left out and one hung"
    assert Counter(row["slowest_rank"] for row in rows).most_common(1)[0][0] == 1
    assert all(row["own_time_max"] > 0.2 for row in rows)
    assert any(detail.startswith("rank 1 on ") for detail in details(directory, "slow rank"))
    assert ("skipped", 4) in events(directory)
    assert ("hang", 11) in events(directory)
    assert ended(directory) == ("failed", 10, True)
    assert "hang: rank " in ending(directory)["detail"]
    stacks = [(directory / "stacks" / f"rank_{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert "take_steps" in stacks[0]
    assert "faulty_train.py" in stacks[1]
    assert "in run" in stacks[1]
    assert "watchdog: hang: rank 1" in errors


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_the_job(tmp_path: Path) -> None:
    process = start(
        [scenario(tmp_path, "run", *WATCHED)], "--nproc-per-node=2", "--shutdown-timeout=2", "--max-restarts=0"
    )
    directory = tmp_path / "run"
    wait_for(lambda: len(curve(directory)) >= 4, process)
    rank_process(process, 1).send_signal(signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert ended(directory)[::2] == ("failed", True)
    assert "take_steps" in (directory / "stacks" / "rank_0.txt").read_text(encoding="utf-8")
    assert not (directory / "stacks" / "rank_1.txt").exists()
    assert "watchdog: hang: rank 0" in errors


@pytest.mark.slow
def test_torchrun_hands_on_a_signal_and_a_second_job_is_kept_out(tmp_path: Path) -> None:
    """SIGUSR1 to torchrun alone; meanwhile somebody gives the same command again."""
    wanted = scenario(tmp_path, "run", "train.steps=100000", "checkpoint.every=100000", "log.every=1")
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
    process = start([wanted], "--nproc-per-node=2", handled, "--max-restarts=1")
    directory = tmp_path / "run"
    wait_for(lambda: len(curve(directory)) >= 2, process)
    started = len(details(directory, "started"))
    second = start([wanted])
    output, errors = second.communicate(timeout=120)
    assert exit_codes(output) == [1]
    (line,) = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    assert line.startswith(f"train.py: {directory}: process {rank_process(process, 0).pid} on ")
    assert line.endswith("is training here; give each run its own directory")
    assert len(details(directory, "started")) == started
    assert not (directory / "exit.json").exists()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    reason, step, resumable = ended(directory)
    assert (reason, resumable, ending(directory)["detail"]) == ("interrupted", True, "SIGUSR1")
    assert events(directory)[-1] == ("interrupted", step)
    assert [read_meta(path)["step"] for path in list_checkpoints(directory / "checkpoints")] == [step]
    assert os.listdir(directory / "checkpoints").count(".lock") <= 1
