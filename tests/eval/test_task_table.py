"""The tasks of a run, from its metrics to its report, and from train.py to its metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data.prepare
from eval.report import write_report
from eval.task_table import TaskLine, task_table
from tests.eval.lm_eval_tasks import write_tasks
from tests.eval.recorded import record_run

ROOT = Path(__file__).resolve().parents[2]


def test_first_and_last_values_after_a_resume() -> None:
    rows = [
        {"step": 10, "task/a/accuracy": 0.1, "task/a/map": [[1]]},
        {"step": 20, "task/a/accuracy": 0.9, "task/b/x/y": 2},
        {"step": 15, "task/a/accuracy": 0.2},
    ]
    assert task_table(rows) == [TaskLine("a", "accuracy", 10, 0.1, 15, 0.2)]
    assert task_table(rows[:2])[1] == TaskLine("b", "x/y", 20, 2, 20, 2)
    assert task_table([]) == []


def test_the_report_shows_them(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run")
    assert 'id="tasks"' not in write_report(run).read_text(encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in (100, 400):
            file.write(json.dumps({"step": step, "task/recall/accuracy": step / 1000}) + "\n")
    page = write_report(run).read_text(encoding="utf-8")
    assert '<section id="tasks">' in page
    assert "<td>recall</td><td>accuracy</td>" in page
    assert '<td class="number">0.1</td>' in page
    assert '<td class="number">0.4</td>' in page


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


def test_a_run_asks_both_kinds_of_tasks(corpus: Path, tmp_path: Path) -> None:
    """Every n steps and at the end. That steps do not notice: `test_in_loop.py`."""
    (tmp_path / "text.txt").write_text("Licensed under the Apache License, Version 2.0\n" * 3)
    command = [sys.executable, "train.py", "tests/assets/tiny.yaml", f"log.directory={tmp_path}", "train.steps=5"]
    command += [f"data.corpora=[{{path: {corpus}}}]", "eval.every=null", "eval.prompts=[]", "checkpoint.every=99"]
    tasks = [
        "eval.tasks=[bits_per_byte, tiny_choice, tiny_generation]",
        "eval.tasks_every=2",
        f"eval.tasks_include={write_tasks(tmp_path / 'tasks')}",
        f"eval.task_options={{bits_per_byte: {{path: {tmp_path / 'text.txt'}}}}}",
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    arguments = [*command, "name=run", *tasks]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row for row in rows if "task/bits_per_byte/bits_per_byte" in row}
    assert list(found) == [2, 4, 5]
    assert found[5]["task/bits_per_byte/bits_per_byte"] < found[2]["task/bits_per_byte/bits_per_byte"]
    assert {"task/tiny_choice/acc", "task/tiny_generation/exact_match"} <= found[2].keys()
    assert "step 4: bits_per_byte bits_per_byte " in (tmp_path / "run" / "log.txt").read_text()
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<td>tiny_choice</td><td>acc</td>" in page
