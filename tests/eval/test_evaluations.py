"""Evaluations of a run from wherever they were written; those that are broken, or of weights it left, are named."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.tokenizer import Tokenizer
from eval.__main__ import default_output
from eval.__main__ import main as evaluate
from eval.evaluations import Evaluation, read_evaluations
from eval.report import main as report
from eval.run_record import read_run
from models.checkpoint import MANIFEST, META, checkpoint_name
from tests.eval.recorded import record_run, training_row, write_metrics
from tests.models.griffin import griffin, griffin_config, write_run

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tokenizer.model"


def record(step: int, digest: str = "", date: str = "2026-11-23T10:00:00+00:00", **results: Any) -> dict[str, Any]:
    """What `python -m eval` writes of a checkpoint."""
    return {
        "model": f"runs/run/checkpoints/{checkpoint_name(step)}",
        "digest": digest,
        "date": date,
        "settings": {"recall": {"rows": 64}, "num_fewshot": None, "limit": None, "seed": 0},
        "results": {"recall": results},
    }


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_checkpoint(run: Path, step: int, content: str) -> str:
    """As much of one as tells it from another; returns its digest."""
    checkpoint = run / "checkpoints" / checkpoint_name(step)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / MANIFEST).write_text(content)
    return hashlib.sha256(content.encode()).hexdigest()


def read(run: Path, left: tuple[tuple[int, int], ...] = ()) -> tuple[list[Evaluation], list[str]]:
    notes: list[str] = []
    return list(read_evaluations(run, [], left, notes)), notes


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run with a checkpoint of step 150, asked by `python -m eval` into every place it writes to."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    model = griffin(griffin_config(vocab_size=Tokenizer(TOKENIZER).vocab_size)).eval()
    write_run(run, model, TOKENIZER, step=150)
    record_run(run)
    text = run.parent / "text.txt"
    text.write_text("Licensed under the Apache License.")
    asked = ["--tasks", "bits_per_byte", "--set", f"bits_per_byte.path={text}", "--device", "cpu"]
    checkpoint = run / "checkpoints" / checkpoint_name(150)
    for arguments in ([checkpoint, *asked], [run, *asked]):
        assert evaluate([str(argument) for argument in arguments]) == 0
    return run


def test_what_the_command_writes_is_found_in_every_place(evaluated: Path) -> None:
    run = read_run(evaluated)
    assert run.notes == ()
    assert [(one.step, one.in_training) for one in run.evaluations] == [(150, False)] * 2
    sources = sorted(one.source.split(" of ")[0] for one in run.evaluations)
    assert sources == ["evaluations/step_00000150.json", "results.json"]
    assert len({one.results["bits_per_byte"]["bits_per_byte"] for one in run.evaluations}) == 1
    assert run.evaluations[0].settings["bits_per_byte"]["path"].endswith("text.txt")


def test_a_checkpoint_that_is_no_runs_has_them_beside_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "kept"
    checkpoint.mkdir()
    (checkpoint / META).touch()
    assert default_output(checkpoint) == tmp_path / "kept.results.json"
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_both_pages_show_it(evaluated: Path) -> None:
    found = read_run(evaluated).evaluations[0].results["bits_per_byte"]["bits_per_byte"]
    other = evaluated.parent / "other"
    record_run(other)
    assert report([str(evaluated)]) == 0
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="tasks">') : page.index('<section id="layers">')]
    assert f'<td class="number">{found:.4f}</td><td class="number">150</td>' in section
    assert report([str(evaluated), str(other)]) == 0
    page = (evaluated.parent / "comparison.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="evaluations">') : page.index('<section id="curves">')]
    assert f'<td class="number">{found:.4f} <small title="' in section
    assert ">step 150</small>" in section


def test_the_step_is_the_file_s_or_its_model_s(tmp_path: Path) -> None:
    write(tmp_path / "evaluations" / "step_00000200.hellaswag.json", record(100, accuracy=0.25))
    write(tmp_path / "results.json", record(300, accuracy=0.5))
    found, notes = read(tmp_path)
    assert [(one.step, one.results["recall"]["accuracy"]) for one in found] == [(200, 0.25), (300, 0.5)]
    assert notes == []
    write(tmp_path / "results.json", record(300) | {"model": "downloads/gpt2 (gpt2, by transformers)"})
    found, notes = read(tmp_path)
    assert [one.step for one in found] == [200]
    (note,) = notes
    assert note == (
        "results.json: is of downloads/gpt2 (gpt2, by transformers), which is no step of the run; evaluate the run or "
        "one of its checkpoints; it was left out."
    )


def test_of_one_step_the_latest_comes_last(tmp_path: Path) -> None:
    write(tmp_path / "evaluations" / "step_00000200.json", record(200, date="2026-11-23T12:00:00", accuracy=0.5))
    write(tmp_path / "results.json", record(200, date="2026-11-23T11:00:00", accuracy=0.25))
    assert [one.results["recall"]["accuracy"] for one in read(tmp_path)[0]] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model": "runs', "cannot be read (Unterminated string"),
        ("", "cannot be read (Expecting value"),
        ("[1]", "holds no model, digest, date, settings, results as python -m eval writes it"),
        (json.dumps({**record(200), "digest": None}), "holds no digest as"),
        (json.dumps({**record(200), "results": {"recall": 0.5}}), "holds no results.recall as"),
        (b"\xff\xfe\x00", "cannot be read ('utf-8' codec"),
    ],
)
def test_a_broken_file_is_named_and_the_rest_is_shown(tmp_path: Path, content: str | bytes, said: str) -> None:
    run = record_run(tmp_path / "run")
    write(run / "evaluations" / "step_00000100.json", record(100, accuracy=0.4321))
    broken = run / "evaluations" / "step_00000200.json"
    broken.write_bytes(content if isinstance(content, bytes) else content.encode())
    (note,) = read_run(run).notes
    assert note.startswith(f"evaluations/step_00000200.json: {said}")
    assert note.endswith("evaluate again; it was left out.")
    other = record_run(tmp_path / "other")
    for arguments, page in (([run], run / "report.html"), ([run, other], tmp_path / "comparison.html")):
        assert report([str(argument) for argument in arguments]) == 0
        text = page.read_text(encoding="utf-8")
        assert "evaluations/step_00000200.json: " in text
        assert "0.4321" in text


def test_weights_that_the_run_left_do_not_count(tmp_path: Path) -> None:
    """It went back from 300 to 200; a file of 300 may be of either 300, and only a checkpoint can tell."""
    for step in (200, 300):
        write(tmp_path / "evaluations" / f"{checkpoint_name(step)}.json", record(step, digest=f"{step}", accuracy=0.5))
    assert [one.step for one in read(tmp_path)[0]] == [200, 300]
    found, notes = read(tmp_path, ((200, 300),))
    assert [one.step for one in found] == [200]
    (note,) = notes
    assert note == (
        "evaluations/step_00000300.json: is of step 300, and the run went back from step 300 to 200; evaluate a "
        "checkpoint that it has; it was left out."
    )
    digest = write_checkpoint(tmp_path, 300, "again")
    found, notes = read(tmp_path, ((200, 300),))
    assert [one.step for one in found] == [200]
    (note,) = notes
    assert note == (
        "evaluations/step_00000300.json: is of other weights than checkpoints/step_00000300; evaluate that again; it "
        "was left out."
    )
    write(tmp_path / "evaluations" / "step_00000300.json", record(300, digest=digest, accuracy=0.75))
    found, notes = read(tmp_path, ((200, 300),))
    assert [one.results["recall"]["accuracy"] for one in found] == [0.5, 0.75]
    assert notes == []


@pytest.fixture
def rolled_back(tmp_path: Path) -> Callable[[str], Path]:
    """A run that went back from step 300 to 200 by such an event, and was asked tasks at 100, 200 and 300 before."""

    def make(event: str) -> Path:
        first = [training_row(step) for step in range(1, 301)]
        asked = [{"step": step, "task/recall/accuracy": step / 1000} for step in (100, 200, 300)]
        back = {"step": 200, "event": event, "detail": ""}
        write_metrics(tmp_path, [*first, *asked, back, *(training_row(step) for step in range(201, 251))])
        write(tmp_path / "evaluations" / "step_00000300.json", record(300, accuracy=0.5))
        return tmp_path

    return make


@pytest.mark.parametrize("event", ["rolled back", "resumed"])
def test_a_run_that_went_back_and_has_not_come_to_the_step_again(rolled_back: Any, event: str) -> None:
    run = read_run(rolled_back(event))
    assert [(one.step, one.in_training) for one in run.evaluations] == [(100, True), (200, True)]
    assert any("the run went back from step 300 to 200" in note for note in run.notes)


def test_a_run_that_began_again_left_all_its_steps(rolled_back: Any) -> None:
    run = rolled_back("started")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_metrics(run, [row | {"step": 0} if "event" in row else row for row in rows])
    found = read_run(run)
    assert found.evaluations == ()
    assert [row["step"] for row in found.training] == list(range(201, 251)), "what was logged since"
