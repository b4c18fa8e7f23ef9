"""What follows a run's checkpoints: each has its command once, in their order, and one that fails is tried again."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from models.checkpoint import MANIFEST
from training.followers import FOLLOWED, follow, main


def make(run: Path, *steps: int, content: str = "") -> None:
    for step in steps:
        path = run / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True, exist_ok=True)
        (path / MANIFEST).write_text(content)


class Starts:
    """Lists the steps it is called with; fails at those in `failing`."""

    def __init__(self, *failing: int) -> None:
        self.steps: list[int] = []
        self.failing = set(failing)

    def __call__(self, path: Path) -> None:
        step = int(path.name.removeprefix("step_"))
        self.steps.append(step)
        if step in self.failing:
            raise OSError(f"no luck with {path.name}")


def listed(run: Path) -> list[int]:
    lines = (run / FOLLOWED).read_text().splitlines()
    return [int(line.split()[0].removeprefix("step_")) for line in lines]


def test_a_run_that_is_not_there_yet_has_no_followers(tmp_path: Path) -> None:
    start = Starts()
    assert follow(tmp_path / "run", start) == []
    (tmp_path / "run").mkdir()
    assert follow(tmp_path / "run", start) == []
    assert (start.steps, list((tmp_path / "run").iterdir())) == ([], [])


def test_each_is_followed_once_and_oldest_first(tmp_path: Path) -> None:
    make(tmp_path, 100000000, 30, 99999999, 20)
    (tmp_path / "checkpoints" / "latest").symlink_to("step_00000030")
    start = Starts()
    found = follow(tmp_path, start)
    assert start.steps == listed(tmp_path) == [20, 30, 99999999, 100000000]
    assert [path.parent for path in found] == [tmp_path / "checkpoints"] * 4
    make(tmp_path, 25)
    assert [path.name for path in follow(tmp_path, start)] == ["step_00000025"]
    assert follow(tmp_path, start) == []
    assert start.steps[4:] == [25]
    make(tmp_path, 30, content="saved again after the run went back")
    assert [path.name for path in follow(tmp_path, start)] == ["step_00000030"]


def test_one_that_fails_is_not_listed_and_tried_again_before_those_after_it(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    start = Starts(20)
    for _ in range(2):
        with pytest.raises(OSError, match="step_00000020"):
            follow(tmp_path, start)
        assert listed(tmp_path) == [10]
    assert start.steps == [10, 20, 20]
    start.failing.clear()
    follow(tmp_path, start)
    assert start.steps == [10, 20, 20, 20, 30]
    assert listed(tmp_path) == [10, 20, 30]


def test_two_that_look_at_once_share_the_work(tmp_path: Path) -> None:
    make(tmp_path, 10)
    inside, start = threading.Event(), Starts()

    def slowly(path: Path) -> None:
        inside.set()
        other.join(0.2)  # which has to wait until this one is listed
        start(path)

    other = threading.Thread(target=lambda: inside.wait() and follow(tmp_path, start))
    other.start()
    follow(tmp_path, slowly)
    other.join()
    assert start.steps == listed(tmp_path) == [10]


def command(tmp_path: Path, status: str = "0") -> list[str]:
    """Writes down what it was called with and what it saw of Slurm; fails while `status` is not 0."""
    script = tmp_path / "command.py"
    seen = "{'argument': sys.argv[1], 'slurm': sorted(key for key in os.environ if key.startswith('SLURM'))}"
    (tmp_path / "status").write_text(status)
    script.write_text(
        f"import json, os, sys\nwith open({str(tmp_path / 'calls')!r}, 'a') as file:\n"
        f"    file.write(json.dumps({seen}) + '\\n')\n"
        f"sys.exit('refused' if open({str(tmp_path / 'status')!r}).read() != '0' else 0)\n"
    )
    return ["--", sys.executable, str(script)]


def calls(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_the_command_gets_the_checkpoint_and_sees_nothing_of_this_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [key for key in os.environ if key.startswith("SLURM")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/somewhere")
    run = tmp_path / "run"
    make(run, 10)
    assert main([str(run), "--once", *command(tmp_path)]) == 0
    assert calls(tmp_path) == [{"argument": str(run / "checkpoints" / "step_00000010"), "slurm": ["SLURM_CONF"]}]
    assert main([str(run), "--once", *command(tmp_path)]) == 0
    assert len(calls(tmp_path)) == 1


def test_a_refused_command_is_given_again_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    make(run, 10)
    refused = command(tmp_path, "1")
    assert main([str(run), "--once", *refused]) == 1
    assert (run / FOLLOWED).read_text() == ""
    capsys.readouterr()
    looks = iter(["1", "1", "0", "0"])

    def until_the_looks_end(seconds: float) -> None:
        assert seconds == 3.0
        try:
            (tmp_path / "status").write_text(next(looks))
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("time.sleep", until_the_looks_end)
    with pytest.raises(KeyboardInterrupt):
        main([str(run), "--every", "3", *refused])
    assert len(calls(tmp_path)) == 5, "one --once, three that are refused, one that is not"
    assert listed(run) == [10]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "step_00000010: exit status 1: refused" in said
