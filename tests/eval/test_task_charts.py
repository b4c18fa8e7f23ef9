"""What tasks found, in the report: heat maps with every share, curves beyond the trained length, and results.json."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.evaluations import Evaluation
from eval.report import write_report
from eval.run_record import read_run
from eval.task_charts import heat_maps, latest, position_charts, step_charts, task_section
from tests.eval.recorded import record_run

MAP = [[1024, 0.0, 1.0], [1024, 1.0, 0.75], [65536, 0.0, 0.0], [65536, 1.0, 0.5]]
BUCKETS = [[0, 1, 5.0, None], [1, 2, 4.0, None], [2, 4, 3.0, None], [4, 8, 3.5, 2.5], [8, 16, 4.0, 2.5]]


def row(step: int, **metrics: Any) -> dict[str, Any]:
    return {"step": step} | {f"task/passkey/{key}": value for key, value in metrics.items()}


def asked(step: int, task: str = "passkey", in_training: bool = True, **metrics: Any) -> Evaluation:
    source = "in training" if in_training else "results.json of 2026-11-23"
    return Evaluation(step=step, in_training=in_training, source=source, results={task: metrics}, settings={})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = record_run(tmp_path_factory.mktemp("runs") / "recorded")
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        for found in (row(200, accuracy=0.1, heat_map=[[1024, 0.0, 0.1]]), row(400, accuracy=0.5625, heat_map=MAP)):
            file.write(json.dumps(found) + "\n")
    results = {"length_extrapolation": {"excess": 0.625, "loss_by_position": BUCKETS}}
    written = {
        "model": "runs/recorded/checkpoints/step_00000350",
        "digest": "",
        "date": "2026-11-23T10:00:00",
        "settings": {},
        "results": results,
    }
    (directory / "results.json").write_text(json.dumps(written))
    return directory


def test_the_page_shows_maps_curves_and_figures(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    section = page[page.index('<section id="tasks">') : page.index('<section id="layers">')]
    assert "share of right answers by length and by depth in it; step 400, in training" in section
    cells = re.findall(r'<td style="--share: (\d+)%">([\d.]+)</td>', section)
    assert cells == [("100", "1.00"), ("0", "0.00"), ("75", "0.75"), ("50", "0.50")], (
        "a line a depth, a column a length"
    )
    assert re.findall(r"<th>([\d,]+)</th>", section) == ["1,024", "65,536"]
    assert '<td class="number">0.6250</td><td class="number">350</td>' in section
    assert '<td title="results.json of 2026-11-23">results.json</td>' in section
    assert "step 350, results.json of 2026-11-23; nats" in section
    assert 'aria-label="length_extrapolation: loss by position"' in section
    assert "var(--validation)" in section, "the curve of the windows"
    assert '<a href="#tasks">' in page


def test_what_was_not_asked_stays_empty() -> None:
    (found,) = heat_maps(latest([asked(1, heat_map=MAP[:3])]))
    assert found.cells == [[1.0, 0.0], [0.75, None]]
    assert (found.lengths, found.depths) == (["1,024", "65,536"], ["0%", "100%"])


def test_the_last_result_of_each_task_counts_in_training_and_since() -> None:
    evaluations = [asked(1, accuracy=0.1), asked(2, "parity", accuracy=0.5), asked(3, accuracy=0.3)]
    found = latest([*evaluations, asked(3, in_training=False, accuracy=0.4)])
    assert [(one.task, one.source, one.metrics) for one in found] == [
        ("passkey", "step 3, in training", {"accuracy": 0.3}),
        ("parity", "step 2, in training", {"accuracy": 0.5}),
        ("passkey", "step 3, results.json of 2026-11-23", {"accuracy": 0.4}),
    ]
    assert heat_maps(found) == []
    assert position_charts(found) == []


def test_rows_within_the_trained_length_alone_are_one_curve() -> None:
    (chart,) = position_charts(latest([asked(1, loss_by_position=BUCKETS[:3])]))
    assert "trained length" not in chart.svg
    assert ">position<" in chart.svg


def test_a_task_asked_at_several_steps_is_a_curve(run: Path) -> None:
    (chart,) = step_charts(read_run(run))
    assert (chart.title, chart.caption) == ("passkey: accuracy", "in training")
    assert 'id="task-steps-0-task"' in chart.svg


def test_a_run_without_tasks_has_no_section(tmp_path: Path) -> None:
    plain = record_run(tmp_path / "plain")
    assert task_section(read_run(plain)) == {}
