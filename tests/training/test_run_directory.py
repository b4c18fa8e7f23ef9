"""The run directory: claimed by one, left as it was found by whoever is refused, marked at the end."""

import json
import os
from pathlib import Path

import pytest

from training.ending import MARKER, exit_code, refusal_of
from training.lock import LockError
from training.run_directory import RunDirectory, tell_of_refusal


def marker(path: Path) -> dict:
    return json.loads((path / MARKER).read_text())


def make_run(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("name: run\n")
    return path


def test_what_is_refused_leaves_its_reason_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "deep" / "run"

    def refuse() -> None:
        with RunDirectory(path, lead=True) as directory:
            directory.claim()
            with directory.failures_marked():
                raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refuse()
    (beside,) = path.parent.iterdir()
    assert beside.name == refusal_of(path)
    ending = json.loads(beside.read_text())
    assert (ending["reason"], ending["detail"], ending["resumable"]) == ("failed", "ValueError: refused", False)
    with RunDirectory(path, lead=True) as directory:
        directory.claim()
        assert list(path.parent.iterdir()) == [path], "the next start takes it away"
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("lead", [True, False])
def test_what_is_refused_before_the_claim_is_marked_by_the_lead(tmp_path: Path, lead: bool) -> None:
    path = make_run(tmp_path / "run")
    with (
        RunDirectory(path, lead=lead) as directory,
        pytest.raises(ValueError, match="too few ranks"),
        directory.refusals_marked(),
    ):
        raise ValueError("too few ranks")
    assert (path / MARKER).exists() == lead
    assert not lead or (marker(path)["detail"], marker(path)["resumable"]) == ("too few ranks", False)


def test_a_refusal_leaves_another_job_s_directory_as_it_is(tmp_path: Path) -> None:
    """A run's, and one's that is still being made."""
    for path in (make_run(tmp_path / "run"), tmp_path / "young"):
        with RunDirectory(path, lead=True) as first:
            first.claim()
            before = {found: found.read_bytes() for found in tmp_path.rglob("*") if found.is_file()}
            tell_of_refusal(path, "too few ranks")
            with RunDirectory(path, lead=True) as second, pytest.raises(LockError), second.refusals_marked():
                second.claim()
            assert {found: found.read_bytes() for found in tmp_path.rglob("*") if found.is_file()} == before


def test_a_directory_that_became_a_run_stays_with_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    path = tmp_path / "runs" / "run"
    with RunDirectory(path, lead=True) as directory:
        directory.claim()
        (path / "config.yaml").write_text("")
        directory.step = 7
        directory.end("interrupted", "SIGUSR1", resumable=True)
    ending = marker(path)
    assert ending.pop("time") > 1.7e9
    assert ending == {"reason": "interrupted", "detail": "SIGUSR1", "step": 7, "resumable": True, "job": "4711"}
    with RunDirectory(path, lead=True) as directory:
        directory.claim()
        assert not (path / MARKER).exists(), "the mark of an earlier end goes at the start"
    assert sorted(os.listdir(path)) == [".lock", "config.yaml"]


def test_two_jobs_on_one_directory(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with RunDirectory(path, lead=True) as first, RunDirectory(path, lead=True) as second:
        first.claim()
        first.end("finished", "", resumable=False)
        before = {name: (path / name).read_bytes() for name in os.listdir(path)}
        with pytest.raises(LockError, match=rf"{path}: process {os.getpid()} .* is training here; give each run"):
            second.claim()
        assert {name: (path / name).read_bytes() for name in os.listdir(path)} == before


@pytest.mark.parametrize(
    ("error", "resumable"), [(ValueError("x: 3; too small"), False), (RuntimeError("a rank is gone"), True)]
)
def test_the_first_failure_counts(tmp_path: Path, error: Exception, resumable: bool) -> None:
    path = make_run(tmp_path / "run")
    with RunDirectory(path, lead=True) as lead, RunDirectory(path, lead=False) as other:
        lead.claim()
        other.claim()
        other.step = 3
        with pytest.raises(type(error)), other.failures_marked():
            raise error
        with pytest.raises(RuntimeError), lead.failures_marked():
            raise RuntimeError("connection closed by peer")
    ending = marker(path)
    assert (ending["reason"], ending["step"], ending["resumable"]) == ("failed", 3, resumable)
    assert ending["detail"] == f"{type(error).__name__}: {error}"


def test_other_ranks_leave_the_good_end_to_the_lead(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with RunDirectory(path, lead=False) as other:
        other.claim()
        other.end("finished", "", resumable=False)
    assert sorted(os.listdir(path)) == ["config.yaml"]


def test_a_directory_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with (
        RunDirectory(tmp_path / "runs" / "run", lead=True) as directory,
        pytest.raises(
            ValueError, match=r"log\.directory: '.*runs'; .* cannot be made and written to \(Not a directory\)"
        ),
    ):
        directory.claim()


def test_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert [exit_code(reason) for reason in ("finished", "interrupted", "failed")] == [0, 75, 1]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert [exit_code(reason) for reason in ("finished", "interrupted", "failed")] == [0, 0, 1]
