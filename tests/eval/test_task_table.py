"""The tasks of a run, from its metrics to its report, and from train.py to its metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import data.prepare
import models.hf.__main__
from eval.evaluations import Evaluation
from eval.report import write_report
from eval.task_table import Metric, Value, compare_tasks, leading, task_table
from models.checkpoint import read_weights
from models.hf.importing import open_directory
from tests.eval.lm_eval_tasks import write_tasks
from tests.eval.recorded import record_run
from tests.forked_train import ForkedTrain
from tests.parallel.launch import CPU_ONLY

ROOT = Path(__file__).resolve().parents[2]


def asked(step: int, in_training: bool = True, **results: dict[str, Any]) -> Evaluation:
    return Evaluation(step=step, in_training=in_training, source=f"of {step}", results=results, settings={})


def test_first_and_last_values() -> None:
    found = [
        asked(10, a={"accuracy": 0.1, "accuracy_stderr": 0.03, "map": [[1]]}),
        asked(15, a={"accuracy": 0.2}, b={"x/y": 2}),
        asked(15, False, a={"accuracy": 0.3}),
        asked(15, False, a={"accuracy": 0.4, "rows": True}),
    ]
    accuracy, since, other = task_table(found)
    assert accuracy == (
        Metric("a", "accuracy", True),
        Value(10, 0.1, 0.03, "of 10"),
        Value(15, 0.2, None, "of 15"),
    )
    assert other == (Metric("b", "x/y", True), Value(15, 2, None, "of 15"), Value(15, 2, None, "of 15"))
    assert since.metric == Metric("a", "accuracy", False)
    assert since.first == since.last, "of two at a step the later one counts"
    assert since.last.value == 0.4
    assert (accuracy.first.text, other.last.text) == ("0.1000 ± 0.03", "2")
    assert Value(1, 1234.56, 10.44, "").text == "1,234.6 ± 10"
    assert task_table([]) == []


def test_metrics_that_come_later_stand_with_their_task() -> None:
    runs = [[asked(1, a={"x": 0.1}, b={"x": 0.2})], [asked(2, a={"x": 0.3, "y": 0.4})]]
    rows = compare_tasks(runs)
    assert [(row.metric.task, row.metric.name) for row in rows] == [("a", "x"), ("a", "y"), ("b", "x")]
    assert [[value and value.value for value in row.last] for row in rows] == [[0.1, 0.3], [None, 0.4], [0.2, None]]
    assert [metric.name for metric in leading({row.metric: None for row in rows})] == ["x", "x"]


def test_the_report_shows_them(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    assert 'id="tasks"' not in write_report(run).read_text(encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in (100, 400):
            file.write(json.dumps({"step": step, "task/recall/accuracy": step / 1000}) + "\n")
    page = write_report(run).read_text(encoding="utf-8")
    assert '<section id="tasks">' in page
    assert "<td>recall</td><td>accuracy</td>" in page
    assert "<strong>recall: accuracy</strong>" in page, "the curve"
    assert '<td class="number">0.1000</td>' in page
    assert '<td class="number">0.4000</td>' in page


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    paragraphs = [p for p in (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n") if p.strip()]
    source = directory / "license.jsonl"
    source.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs), encoding="utf-8")
    tokenizer = str(ROOT / "tests" / "assets" / "tokenizer.model")
    arguments = ["--input", str(source), "--tokenizer", tokenizer, "--valid-fraction", "0.1"]
    assert data.prepare.main([*arguments, "--output", str(directory / "corpus")]) == 0
    return directory / "corpus"


def arguments(corpus: Path, directory: Path, *overrides: str) -> list[str]:
    """Of train.py: a short run that asks tasks every other step, and at its end."""
    (directory / "text.txt").write_text("Licensed under the Apache License, Version 2.0\n" * 3)
    include = directory / "tasks"
    return [
        "tests/assets/tiny.yaml",
        f"log.directory={directory}",
        "name=run",
        "train.steps=5",
        f"data.corpora=[{{path: {corpus}}}]",
        "eval.every=null",
        "eval.prompts=[]",
        "checkpoint.every=99",
        "eval.tasks=[bits_per_byte, tiny_choice, tiny_generation]",
        "eval.tasks_every=2",
        f"eval.tasks_include={include if include.is_dir() else write_tasks(include)}",
        f"eval.task_options={{bits_per_byte: {{path: {directory / 'text.txt'}}}}}",
        *overrides,
    ]


def answers(run: Path) -> dict[int, dict[str, float]]:
    """step -> what the tasks found."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "task/bits_per_byte/bits_per_byte" in row}


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    directory = tmp_path_factory.mktemp("alone")
    done = ForkedTrain(arguments(corpus, directory), directory / "said").wait(timeout=180)
    assert done.returncode == 0, done.stderr
    return directory / "run"


def test_a_run_asks_both_kinds_of_tasks(alone: Path) -> None:
    """Every n steps and at the end. That steps do not notice: `test_in_loop.py`."""
    found = answers(alone)
    assert list(found) == [2, 4, 5]
    assert found[5]["task/bits_per_byte/bits_per_byte"] < found[2]["task/bits_per_byte/bits_per_byte"]
    assert {"task/tiny_choice/acc", "task/tiny_generation/exact_match"} <= found[2].keys()
    assert "step 4: bits_per_byte bits_per_byte " in (alone / "log.txt").read_text()
    page = write_report(alone).read_text(encoding="utf-8")
    assert "tiny_choice" in page


@pytest.mark.slow
@pytest.mark.parametrize("split", ["pipeline=2", "tensor=2", "sequence=2", "zero_stage=3"])
def test_ranks_that_hold_parts_find_the_same_and_their_run_is_exported(
    split: str, alone: Path, corpus: Path, tmp_path: Path
) -> None:
    """Two ranks, from torchrun to metrics, log, report and a directory for transformers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    command += arguments(corpus, tmp_path, f"parallel.{split}")
    environment = os.environ | CPU_ONLY | {"HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    run, expected = tmp_path / "run", answers(alone)
    found = answers(run)
    assert list(found) == [2, 4, 5]
    for step, metrics in found.items():
        assert metrics.keys() == expected[step].keys()
        for key, value in metrics.items():
            assert value == pytest.approx(expected[step][key], rel=1e-4), (step, key)
    assert "step 4: bits_per_byte bits_per_byte " in (run / "log.txt").read_text()
    assert "tiny_choice" in write_report(run).read_text(encoding="utf-8")
    assert models.hf.__main__.main(["export", str(run), str(tmp_path / "hf")]) == 0
    weights, directory = read_weights(run / "checkpoints" / "step_00000005"), open_directory(tmp_path / "hf")
    assert weights.keys() == directory.shapes.keys()
    assert all(torch.equal(directory.read(name), weight) for name, weight in weights.items())
