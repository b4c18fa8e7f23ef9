"""What a refused start of train.py leaves for whoever started it: the reason, and nothing in the way of others."""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import train
from tests.forked_train import ForkedTrain
from training.lock import hold
from training.supervise import main

TINY = str(Path(__file__).parent / "assets" / "tiny.yaml")


def answer(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Of supervise, and its reason."""
    capsys.readouterr()
    assert main([str(run), "--since", "0"]) == 0
    said = capsys.readouterr()
    return said.out.strip(), said.err.splitlines()[-1]


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def make_run(run: Path) -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")


@pytest.mark.parametrize("exists", [False, True])
def test_ranks_that_do_not_divide_are_the_last_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    run = tmp_path / "runs" / "tiny"
    if exists:
        make_run(run)
    arguments = [TINY, f"log.directory={run.parent}", "parallel.tensor=2"]
    assert ForkedTrain(arguments, tmp_path).wait(timeout=180).returncode == 1
    word, reason = answer(run, capsys)
    assert word == "failed"
    assert reason.startswith("supervise: failed: failed at step 0: parallel.pipeline x ")
    assert run.exists() == exists


def test_the_launcher_names_the_directory_of_a_configuration_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "tiny"
    make_run(run)
    arguments = [TINY, f"log.directory={tmp_path}", "train.stepz=3"]
    assert train.main(arguments) == 1
    assert sorted(os.listdir(run)) == ["config.yaml"], "whose is it?"
    monkeypatch.setenv("RUN_DIRECTORY", str(run))
    assert train.main(arguments) == 1
    assert answer(run, capsys)[1].startswith("supervise: failed: failed at step 0: train.stepz: 3; there is no such")


def test_a_refusal_where_another_trains_leaves_its_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "tiny"
    make_run(run)
    ending = json.dumps({"reason": "finished", "time": time.time()})
    (run / "exit.json").write_text(ending)
    monkeypatch.setenv("RUN_DIRECTORY", str(run))
    with ExitStack() as guard:
        hold(run / ".lock", guard, doing="training")
        assert train.main([TINY, "train.stepz=3"]) == 1
    assert (run / "exit.json").read_text() == ending
    assert os.listdir(tmp_path) == ["tiny"]
