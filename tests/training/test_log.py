"""The run directory's writer."""

import json
from pathlib import Path

import pytest

from training.config import WandbConfig
from training.log import RunLog, format_table


def run_directory(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_metrics_events_and_text_are_on_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(run_directory(tmp_path), active=True, total_steps=3)
    log.metrics({"step": 1, "loss": 2.5})
    log.progress(1, 2.5, 100.0)
    log.event(1, "saved", "somewhere")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 1, "event": "saved", "detail": "somewhere"}]
    assert (tmp_path / "run" / "log.txt").read_text().endswith("step 1: saved somewhere\n")
    log.close()


def test_a_torn_line_stays_alone(tmp_path: Path) -> None:
    """What a killed process began to write does not swallow the first line of the next one."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    log = RunLog(tmp_path, active=True, total_steps=3)
    log.metrics({"step": 2, "loss": 1.0})
    log.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines == ['{"step": 1}', '{"step": 2, "lo', '{"step": 2, "loss": 1.0}']


def test_an_inactive_rank_writes_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", active=False, total_steps=3)
    log.metrics({"step": 1})
    log.progress(1, 1.0, 1.0)
    log.event(1, "saved")
    log.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_without_a_network(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = RunLog(
        run_directory(tmp_path),
        active=True,
        total_steps=1,
        wandb=WandbConfig(project="p", mode=mode),
        config={"train": {"steps": 1}},
    )
    log.metrics({"step": 1, "loss": 2.5, "event": "text is left out"})
    log.close()
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))) == (mode == "offline")


def test_wandb_that_cannot_start_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**settings: object) -> None:
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"log\.wandb: online run of project 'p' cannot start \(no API key\); log in"):
        RunLog(run_directory(tmp_path), active=True, total_steps=1, wandb=WandbConfig(project="p"))


def test_table_is_aligned() -> None:
    table = format_table([{"layer": "embed", "parameters": 1234567}, {"layer": "blocks.10", "parameters": 8}])
    assert table.splitlines() == ["layer      parameters", "embed       1,234,567", "blocks.10           8"]
