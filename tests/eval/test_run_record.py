"""Reading a run directory back: repeated steps, torn lines, missing files."""

import json
from pathlib import Path

import pytest

from eval.run_record import Sample, read_run
from tests.eval.recorded import record_run, training_row, validation_row, write_metrics


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(record_run(tmp_path / "run"))
    assert [row["step"] for row in run.training] == list(range(1, 401))
    assert [row["step"] for row in run.validation] == list(range(50, 401, 50))
    assert [row["event"] for row in run.events if row["event"] != "saved"] == ["started", "resumed", "finished"]
    assert run.repeated_steps == 80
    assert run.samples[-1] == Sample(400, "sample of step 400: if a < b & c:\n\tpass\n")
    assert run.notes == ()


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    resumed = {"step": 1, "event": "resumed", "detail": ""}
    again = [training_row(2, loss=7.0), validation_row(2)]
    write_metrics(tmp_path, [training_row(1), training_row(2), training_row(3), validation_row(3), resumed, *again])
    run = read_run(tmp_path)
    assert [(row["step"], row["loss"]) for row in run.training] == [(1, training_row(1)["loss"]), (2, 7.0)]
    assert [row["step"] for row in run.validation] == [2], "step 3 lay behind the resume and was not reached again"
    assert run.repeated_steps == 1


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 2.1', "\x00\x00\x00", '"step"', "{}"])
def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path, torn: str) -> None:
    write_metrics(tmp_path, [training_row(1), training_row(2)], torn=torn)
    run = read_run(tmp_path)
    assert [row["step"] for row in run.training] == [1, 2]
    assert run.notes[0] == "metrics.jsonl: the last line is cut off, as a kill leaves it; it was left out."


def test_a_torn_line_that_was_written_on_is_left_out_and_said(tmp_path: Path) -> None:
    lines = [json.dumps(training_row(1)), '{"step": 2, "lo' + json.dumps(training_row(2)), json.dumps(training_row(3))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path)
    assert [row["step"] for row in run.training] == [1, 3]
    assert run.notes[0] == "metrics.jsonl: line 2 is damaged; it was left out."


def test_missing_files_become_notes(tmp_path: Path) -> None:
    write_metrics(tmp_path, [training_row(1)])
    run = read_run(tmp_path)
    assert (run.layers, run.samples, run.environment, run.config) == ((), (), {}, "")
    assert [note.split(":")[0] for note in run.notes] == ["layers.json", "environment.json", "config.yaml"]


def test_what_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run directory, it has no metrics\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no run directory"):
        read_run(tmp_path / "absent")
    write_metrics(tmp_path, [{"step": 0, "event": "started", "detail": ""}])
    with pytest.raises(ValueError, match="holds no training step yet"):
        read_run(tmp_path)
