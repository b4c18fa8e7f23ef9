"""Several runs on one page: every number is that of its run, and only settings that differ are shown."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.compare import differences, run_names
from eval.report import main
from eval.run_record import read_run
from tests.eval.recorded import record_run, training_row, write_metrics


class Cells(HTMLParser):
    """The text of every table's cells, a list a row, and each cell's class."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str]]] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(("", dict(attrs).get("class") or ""))
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            text, kind = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data.strip(), kind)

    def row(self, *labels: str) -> list[tuple[str, str]]:
        """The cells behind those that hold the labels."""
        count = len(labels)
        (found,) = (row[count:] for row in self.rows if tuple(text for text, _ in row[:count]) == labels)
        return found


def write_evaluation(run: Path, step: int, **settings: object) -> None:
    """What `slurm/eval.sbatch` leaves of a checkpoint."""
    record = {
        "model": str(run / "checkpoints" / f"step_{step:08d}"),
        "digest": "",
        "date": "2026-11-23T10:00:00+00:00",
        "settings": {"recall": {"rows": 64} | settings, "num_fewshot": 5, "limit": None, "seed": 0},
        "results": {
            "recall": {"accuracy": step / 500, "rows": 64},
            "arc_easy": {"acc": 0.25, "acc_stderr": 0.0625, "acc_norm,strict": 0.5, "acc_norm_stderr,strict": 0.125},
        },
    }
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / f"step_{step:08d}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("runs")
    first, second = record_run(directory / "griffin"), record_run(directory / "hgrn2")
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("loss", "val_loss", "val_bits_per_byte", "tokens_per_second"):
            if key in row:
                row[key] *= 1.1
    asked = [{"step": step, "task/recall/accuracy": 0.75 - step / 4000} for step in (100, 400)]
    write_metrics(second, [*rows, *asked])
    for run, steps in ((first, (300,)), (second, (100, 400))):
        for step in steps:
            write_evaluation(run, step)
    (second / "config.yaml").write_text("name: hgrn2\ntrain: {steps: 400, precision: bf16}\n")
    return [first, second]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> str:
    assert main([str(run) for run in runs]) == 0
    return (runs[0].parent / "comparison.html").read_text()


def test_the_table_holds_each_run_s_figures(runs: list[Path], page: str) -> None:
    table = Cells(page)
    last = read_run(runs[0]).validation[-1]["val_bits_per_byte"]
    assert table.row("Bits per byte, last") == [(f"{last:.4f}", "number best"), (f"{1.1 * last:.4f}", "number")]
    assert [kind for _, kind in table.row("Tokens per second, median")] == ["number", "number best"]
    assert table.row("Peak memory, GB") == [("0.9", "number"), ("0.9", "number")], "equal ones are not marked"
    assert [text for text, _ in table.row("Status")] == ["finished", "finished"]


def test_the_last_evaluation_of_each_run_and_task_is_shown_with_its_step(page: str) -> None:
    table = Cells(page)
    assert [text for text, _ in table.row("recall", "accuracy", "in training")] == ["", "0.6500step 400"]
    assert [text for text, _ in table.row("recall", "accuracy", "of checkpoints")] == [
        "0.6000step 300",
        "0.8000step 400",
    ]
    assert [text for text, _ in table.row("recall", "rows", "of checkpoints")] == ["64step 300", "64step 400"]
    errors = [text for text, _ in table.row("arc_easy", "acc", "of checkpoints")]
    assert errors == ["0.2500 ± 0.062step 300", "0.2500 ± 0.062step 400"]
    assert table.row("arc_easy", "acc_norm,strict", "of checkpoints")[0][0].startswith("0.5000 ± 0.12")
    assert "_stderr" not in page
    assert 'title="evaluations/step_00000400.json of 2026-11-23"' in page
    assert '<a href="#evaluations">' in page
    assert "not asked with" not in page


def test_a_task_asked_at_several_steps_is_a_curve(page: str) -> None:
    charts = dict(re.findall(r'<figure id="chart-(task-\d+)">\s*<figcaption><strong>(.*?)</strong>', page))
    assert list(charts.values()) == ["recall: accuracy", "recall: accuracy", "arc_easy: acc"]
    for name in charts:
        assert f'id="{name}-run-1"' in page


def test_tasks_with_other_settings_are_named(tmp_path: Path) -> None:
    found = [record_run(tmp_path / name) for name in ("a", "b")]
    write_evaluation(found[0], 100)
    write_evaluation(found[1], 100, rows=8, path="text.txt")
    assert main([str(run) for run in found]) == 0
    page = (tmp_path / "comparison.html").read_text()
    assert "<li>recall: not asked with the same rows, path in all runs; the figures do not compare.</li>" in page
    assert "arc_easy: not" not in page


def test_a_comparison_of_runs_without_tasks_has_no_such_section(tmp_path: Path) -> None:
    found = [record_run(tmp_path / name) for name in ("a", "b")]
    assert main([str(run) for run in found]) == 0
    assert 'id="evaluations"' not in (tmp_path / "comparison.html").read_text()


def test_the_page_itself_is_no_run(tmp_path: Path) -> None:
    """`runs/*` names it the second time."""
    found = [record_run(tmp_path / name) for name in ("a", "b")]
    for _ in range(2):
        assert main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    assert "no run directory" not in (tmp_path / "comparison.html").read_text()
    assert len(found) == 2


def test_only_settings_that_differ_are_shown(runs: list[Path], page: str) -> None:
    assert differences([read_run(run) for run in runs]) == [
        ("name", ["recorded", "hgrn2"]),
        ("train.precision", ["", "bf16"]),
    ]
    assert "train.steps" not in page
    assert [text for text, _ in Cells(page).row("train.precision")] == ["", "bf16"]


def test_curves_of_all_runs_lie_in_each_chart(page: str) -> None:
    for name in ("loss", "bits-per-byte", "validation-loss", "gradient-norm", "throughput"):
        for run in (0, 1):
            assert re.search(rf'id="{name}-run-{run}"', page), (name, run)
            assert f"var(--run-{run})" in page
    assert "#0002" not in page, "a placeholder colour was left"
    assert "http://" not in page.replace("http://www.w3.org/", ""), "the page needs something beside itself"


def test_events_of_all_runs_are_listed_and_checkpoints_counted(page: str) -> None:
    rows = [[text for text, _ in row] for row in Cells(page).rows]
    assert ["griffin", "150", "resumed", "from step_00000150"] in rows
    assert ["hgrn2", "", "saved", "9 checkpoints"] in rows


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    found = [read_run(record_run(tmp_path / place / "demo")) for place in ("a", "b")]
    assert run_names(found) == ["a/demo", "b/demo"]


def test_a_run_that_has_not_begun_is_left_out_and_named(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "page.html"
    assert main([str(runs[0]), str(tmp_path / "empty"), str(runs[1]), "--output", str(output)]) == 0
    assert "2 runs" in output.read_text()
    assert "empty: no run directory" in output.read_text()
    assert main([str(runs[0]), str(tmp_path / "empty")]) == 1
    assert "name at least two" in capsys.readouterr().err


def test_one_training_row_is_enough(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_metrics(tmp_path / name, [training_row(1)])
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "Training loss" in (tmp_path / "comparison.html").read_text()
