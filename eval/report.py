"""The report of a run as one HTML file: `python -m eval.report RUN` writes RUN/report.html.

Of several runs: `python -m eval.report runs/*` writes a page that compares them (`eval/compare.py`).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from eval.charts import MARKED_EVENTS, draw_charts
from eval.compare import write_comparison
from eval.curves import MEDIAN_ROWS
from eval.page import render_page, write_page
from eval.quantity import compact, duration
from eval.run_record import Row, RunRecord, flatten, read_run
from eval.task_charts import task_section

LONG_VALUE = 160
"""Characters from which a value of the environment is folded away."""


class Figure(NamedTuple):
    """One of the numbers at the top."""

    label: str
    value: str
    unit: str = ""
    detail: str = ""


def write_report(run_directory: Path, output: Path | None = None) -> Path:
    """Writes the report, replacing an older one in one step, and returns where it is.

    Args:
        output: the file; RUN/report.html if None.

    Raises:
        ValueError: `run_directory` holds no run, or no training step yet.
    """
    return write_page(render(read_run(run_directory)), output or run_directory / "report.html")


def render(run: RunRecord) -> str:
    """The report as HTML that needs nothing beside itself."""
    parameters = sum(row["parameters"] for row in run.layers)
    flops = sum(row["flops_per_token"] for row in run.layers)
    values = list(flatten(run.environment))
    content: dict[str, Any] = {
        "tasks": task_section(run),
        "layers": [row | {"share": row["flops_per_token"] / max(flops, 1)} for row in run.layers],
        "samples": list(reversed(run.samples)),
        "events": [{"detail": ""} | event for event in run.events],
        "environment": [(key, value) for key, value in values if len(value) <= LONG_VALUE and "\n" not in value],
        "configuration": run.config,
    }
    return render_page(
        "report.html",
        **content,
        name=run.name,
        status=run.status,
        lede=_lede(run),
        notes=run.notes,
        figures=_figures(run, parameters, flops),
        charts=draw_charts(run),
        curve_key=_curve_key(run),
        parameters=parameters,
        flops_per_token=flops,
        long_environment=[(key, value) for key, value in values if len(value) > LONG_VALUE or "\n" in value],
        sections=[("curves", "Curves"), *((name, name.capitalize()) for name in content if content[name])],
    )


def _lede(run: RunRecord) -> str:
    written = datetime.fromtimestamp((run.path / "metrics.jsonl").stat().st_mtime, tz=UTC)
    mixers = [row["mixer"] for row in run.layers if str(row["layer"]).startswith("blocks.")]
    stack = f"{len(mixers)} blocks of " + ", ".join(dict.fromkeys(mixers)) + ". " if mixers else ""
    return f"{stack}Last record of {written:%Y-%m-%d %H:%M} UTC."


def _figures(run: RunRecord, parameters: int, flops: int) -> list[Figure]:
    last = run.training[-1]
    speeds = [row["tokens_per_second"] for row in run.training if row.get("tokens_per_second")]
    figures = list(_validation_figures(run.validation))
    figures.append(Figure("Training loss", f"{last['loss']:.3f}", "nats", f"at step {last['step']:,}"))
    figures.append(Figure("Tokens trained", compact(last["tokens"]), "", f"{last['step']:,} steps"))
    if parameters:
        figures.append(Figure("Parameters", compact(parameters), "", f"{compact(flops)} FLOPs per token, forward"))
        figures.append(Figure("Compute", compact(3 * flops * last["tokens"]), "FLOPs", "forward and backward"))
    if speeds:
        figures.append(Figure("Throughput", compact(median(speeds)), "tokens/s", "median"))
    memory = [row["memory_gb"] for row in run.training if row.get("memory_gb")]
    peak = f"; peak memory {max(memory):.1f} GB" if memory else ""
    figures.append(Figure("Training time", duration(run.seconds_in_steps), "", f"steps alone{peak}"))
    return figures


def _validation_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    for label, key, unit in (("Bits per byte", "val_bits_per_byte", ""), ("Validation loss", "val_loss", "nats")):
        known = [row for row in rows if row.get(key) is not None]
        if known:
            best = min(known, key=lambda row: row[key])
            is_last = best is known[-1]
            detail = (
                f"the best, at step {best['step']:,}" if is_last else f"best {best[key]:.3f} at step {best['step']:,}"
            )
            yield Figure(label, f"{known[-1][key]:.3f}", unit, detail)


def _curve_key(run: RunRecord) -> str:
    marked = [f"{row['event']} at step {row['step']:,}" for row in run.events if row["event"] in MARKED_EVENTS]
    parts = []
    if len(run.training) >= MEDIAN_ROWS:
        parts.append("Thin lines: every logged step. Thick lines: running median.")
    if marked:
        listed = ", ".join(marked[:4]) + (f" and {len(marked) - 4} more" if len(marked) > 4 else "")
        parts.append(f"Dashed lines: {listed}.")
    if run.repeated_steps:
        parts.append(f"{run.repeated_steps:,} logged steps were computed again; the last result counts.")
    if any(row["event"] == "saved" for row in run.events):
        parts.append("Marks on the step axis: checkpoints.")
    if not run.validation:
        parts.append("No validation yet.")
    return " ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description="Write a run's report, curves, layers, samples, events and environment, as one HTML file; of "
        "several runs, one that lays them over each other.",
        epilog="example: python -m eval.report runs/demo; of several: python -m eval.report runs/*",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write; if not given RUN/report.html, of several runs comparison.html beside the first",
    )
    options = parser.parse_args(arguments)
    try:
        if len(options.runs) == 1:
            print(write_report(options.runs[0], options.output))
        else:
            print(write_comparison(options.runs, options.output))
    except (ValueError, OSError) as error:
        print(f"eval.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
