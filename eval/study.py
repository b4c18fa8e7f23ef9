"""What the mixers are known to be strong and weak at, shown again: `python -m eval.study`.

Trains every run of configs/tasks from several seeds, as a user would (`train.py CONFIG`), collects what the run's own
evaluation tasks said at its end, and holds that against what is known. A study that was stopped goes on where it was:
finished runs are not trained again, a run begun goes on from its checkpoint.

    python -m eval.study --seeds 0 1 2 --output benchmarks/results/study_cpu.json
    python -m eval.study --table benchmarks/results/study_cpu.json
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from configs.schema import ConfigError, RunConfig, load_config
from eval.run_record import RunRecord, read_run

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "tasks"

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""The results of a run, one a seed, by the name of the run."""


@dataclass(frozen=True)
class Claim:
    """A metric of a run that lies in a range, at every seed.

    Attributes:
        run: its name.
        metric: of its task.
        least, most: the range.
        above: another run, all of whose values lie below all of this one's, by `least` at least.
    """

    run: str
    metric: str
    least: float = 0.0
    most: float = 1.0
    above: str | None = None

    def __str__(self) -> str:
        if self.above is not None:
            return f"{self.run}: {self.metric} exceeds that of {self.above} by {self.least:g}"
        bounds = [f"at least {self.least:g}"] * (self.least > 0) + [f"at most {self.most:g}"] * (self.most < 1)
        return f"{self.run}: {self.metric} {' and '.join(bounds)}"

    def holds(self, results: Results) -> bool | None:
        """None where the results lack a run."""
        runs = [run for run in (self.run, self.above) if run is not None]
        values = [[result["metrics"][self.metric] for result in results.get(run, ())] for run in runs]
        if not all(values):
            return None
        if self.above is not None:
            return min(values[0]) - max(values[1]) >= self.least
        return min(values[0]) >= self.least and max(values[0]) <= self.most


CLAIMS = (
    # Trained on rows of 16 tokens; accuracy_64 is of tokens 33 to 64, accuracy_128 of tokens 65 to 128.
    Claim("parity_gated_deltanet", "accuracy_64", least=0.99),
    Claim("parity_paralstm", "accuracy_64", least=0.99),
    Claim("parity_gated_deltanet_positive", "accuracy_64", most=0.6),
    Claim("parity_hgrn2", "accuracy_64", most=0.6),
    Claim("parity_rglru", "accuracy_64", most=0.6),
    Claim("parity_rglru_attention", "accuracy_64", most=0.6),
    # One round of questions at 40 tokens, which no window of 8 shows the answer of; two at 56.
    Claim("recall_gated_deltanet", "accuracy_40", least=0.2, above="recall_rglru"),
    Claim("recall_rglru_attention", "accuracy_40", least=0.2, above="recall_rglru"),
    Claim("recall_rglru_short_attention", "accuracy_40", least=0.2, above="recall_rglru"),
)
"""What is known (docs/evaluation.md), in figures of these runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.table is not None:
            print(report(json.loads(options.table.read_text(encoding="utf-8"))))
            return 0
        runs = {path: load_config(path) for path in options.configs or sorted(CONFIGS.glob("*.yaml"))}
        record = carry_out(runs, options.seeds, options.directory, options.output)
    except (ConfigError, ValueError, OSError) as error:
        print(f"eval.study: {error}", file=sys.stderr)
        return 1
    print(report(record))
    return 0 if all(claim.holds(record["runs"]) is not False for claim in CLAIMS) else 1


def carry_out(runs: Mapping[Path, RunConfig], seeds: Sequence[int], directory: Path, output: Path) -> dict[str, Any]:
    """Trains what is not finished, writing `output` after each run; returns what it holds."""
    for path, run in runs.items():
        if len(run.eval.tasks) != 1:
            raise ValueError(f"{path}: eval.tasks: {list(run.eval.tasks)}; a run of a study asks one task")
    if not output.parent.is_dir():
        raise ValueError(f"--output: {output}; its directory must exist")
    results: dict[str, list[dict[str, Any]]] = {run.name: [] for run in runs.values()}
    record: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "seeds": list(seeds), "runs": results}
    for seed in seeds:
        for path, run in runs.items():
            result, record["environment"] = _result(path, run, seed, directory)
            results[run.name].append(result)
            unfinished = output.with_name(f".{output.name}.{os.getpid()}")
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(output)
    return record


def _result(path: Path, run: RunConfig, seed: int, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run found, and where; it is trained unless it is finished."""
    name = f"{run.name}-seed{seed}"
    settings = [f"name={name}", f"train.seed={seed}", f"data.seed={seed}", f"log.directory={directory}"]
    if not _is_finished(directory / name):
        print(f"python train.py {path} {' '.join(settings)}", file=sys.stderr, flush=True)
        command = [sys.executable, "train.py", str(path.resolve()), *settings]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{name}: train.py ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found = read_run(directory / name)
    environment = {key: found.environment[key] for key in ("git_revision", "device", "python", "packages")}
    return _summary(found, run, seed), environment


def _is_finished(directory: Path) -> bool:
    ending = directory / "exit.json"
    return ending.is_file() and json.loads(ending.read_text(encoding="utf-8"))["reason"] == "finished"


def _summary(found: RunRecord, run: RunConfig, seed: int) -> dict[str, Any]:
    (task,) = run.eval.tasks
    prefix = f"task/{task}/"
    metrics = {key.removeprefix(prefix): value for key, value in found.tasks[-1].items() if key.startswith(prefix)}
    return {
        "seed": seed,
        "task": task,
        "layers": list(run.model.layers),
        "parameters": run.model.num_params(),
        "steps": found.tasks[-1]["step"],
        "trained_length": run.data.sequence_length,
        "loss": found.training[-1]["loss"],
        "metrics": metrics,
    }


def report(record: Mapping[str, Any]) -> str:
    """A table for each task in Markdown, and which claims hold."""
    results: Results = record["runs"]
    tasks = dict.fromkeys(seeds[0]["task"] for seeds in results.values() if seeds)
    parts = []
    for task in tasks:
        runs = {name: seeds for name, seeds in results.items() if seeds and seeds[0]["task"] == task}
        parts.append(table(runs))
    verdicts = {True: "holds", False: "DOES NOT HOLD", None: "not tried"}
    parts.append("\n".join(f"- {claim}: {verdicts[claim.holds(results)]}" for claim in CLAIMS))
    return "\n\n".join(parts)


def table(runs: Results) -> str:
    """A line for each run: mean over seeds of each accuracy, and the least and the most where they differ."""
    first = next(iter(runs.values()))[0]["metrics"]
    metrics = [key for key in first if key.startswith("accuracy_") and key != "accuracy_stderr"]
    lines = [["run", "parameters", *metrics], ["---"] * (2 + len(metrics))]
    for name, seeds in runs.items():
        cells = [_spread([result["metrics"][metric] for result in seeds]) for metric in metrics]
        lines.append([name, f"{seeds[0]['parameters']:,}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{mean(values):.3f} ({low} to {high})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("configs", type=Path, nargs="*", metavar="CONFIG", help="runs; all of configs/tasks if not given")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of weights and rows (0 1 2)")
    add("--directory", type=Path, default=Path("runs/study"), help="where the runs live (%(default)s)")
    add("--output", type=Path, default=Path("runs/study.json"), metavar="FILE", help="what was found (%(default)s)")
    add("--table", type=Path, metavar="FILE", help="print the tables of what an earlier study found, and leave")
    return parser


if __name__ == "__main__":
    sys.exit(main())
