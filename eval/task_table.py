"""What evaluation tasks found, metric by metric: over the steps of a run, and of several runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.evaluations import Evaluation, asked_otherwise

STDERR = "_stderr"


class Metric(NamedTuple):
    """What is followed over steps. In training and since a task may be asked in other words, so the two stay apart."""

    task: str
    name: str
    in_training: bool

    @property
    def asked(self) -> str:
        return "in training" if self.in_training else "of checkpoints"


class Value(NamedTuple):
    """Of a metric at a step, with its standard error where there is one."""

    step: int
    value: float
    error: float | None
    source: str

    @property
    def text(self) -> str:
        """Counts whole, others to four decimals, or one from 10 on; the error to two digits."""
        digits = 0 if isinstance(self.value, int) else 4 if abs(self.value) < 10 else 1
        shown = f"{self.value:,.{digits}f}"
        return shown if self.error is None else f"{shown} ± {self.error:.2g}"


class TaskLine(NamedTuple):
    """A metric of a task over a run: the first and the last value."""

    metric: Metric
    first: Value
    last: Value


class TaskRow(NamedTuple):
    """A metric of a task in several runs: each one's last value, None where it has none."""

    metric: Metric
    last: list[Value | None]


def values_of(evaluations: Sequence[Evaluation]) -> dict[Metric, list[Value]]:
    """The values of every metric that is a number, one a step, steps ascending; the last one made of a step counts.

    Args:
        evaluations: as `read_evaluations` returns them.
    """
    found: dict[Metric, dict[int, Value]] = {}
    for one in evaluations:
        for task, metrics in one.results.items():
            for name, value in metrics.items():
                if _is_number(value) and STDERR not in name:
                    error = _error(metrics, name)
                    at_steps = found.setdefault(Metric(task, name, one.in_training), {})
                    at_steps[one.step] = Value(one.step, value, error, one.source)
    return {metric: list(at_steps.values()) for metric, at_steps in found.items()}


def task_table(evaluations: Sequence[Evaluation]) -> list[TaskLine]:
    """A line for each metric of a run, task by task in the order in which they came."""
    found = values_of(evaluations)
    return [TaskLine(metric, found[metric][0], found[metric][-1]) for metric in in_tasks(found)]


def compare_tasks(runs: Sequence[Sequence[Evaluation]]) -> list[TaskRow]:
    """A row for each metric that any of the runs has, given each one's evaluations."""
    found = [values_of(evaluations) for evaluations in runs]
    return [
        TaskRow(metric, [values[metric][-1] if metric in values else None for values in found])
        for metric in in_tasks(dict.fromkeys(metric for values in found for metric in values))
    ]


def in_tasks(metrics: Mapping[Metric, Any]) -> list[Metric]:
    """Those of a task together, in training first; tasks and metrics in the order in which they came."""
    tasks = list(dict.fromkeys(metric.task for metric in metrics))
    return sorted(metrics, key=lambda metric: (tasks.index(metric.task), not metric.in_training))


def leading(metrics: Mapping[Metric, Any]) -> list[Metric]:
    """The first metric of each task, which is the one to draw."""
    first: dict[tuple[str, bool], Metric] = {}
    for metric in in_tasks(metrics):
        first.setdefault((metric.task, metric.in_training), metric)
    return list(first.values())


def not_alike(runs: Sequence[Sequence[Evaluation]]) -> list[str]:
    """A line for each set of settings that differs between the runs' last checkpoints, with the tasks it concerns."""
    lasts: list[dict[str, Any]] = []
    for evaluations in runs:
        since = [one for one in evaluations if not one.in_training]
        lasts.append({task: one.settings.get(task, one.settings[""]) for one in since for task in one.results})
    tasks: dict[str, list[str]] = {}
    for task in dict.fromkeys(task for last in lasts for task in last):
        other = ", ".join(asked_otherwise([last[task] for last in lasts if task in last]))
        tasks.setdefault(other, []).append(task)
    return [
        f"{', '.join(named)}: not asked with the same {other} in all runs; the figures do not compare."
        for other, named in tasks.items()
        if other
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _error(metrics: Mapping[str, Any], name: str) -> float | None:
    """The standard error beside a metric; lm-eval's filter stands behind both: "acc,strict", "acc_stderr,strict"."""
    metric, comma, kind = name.partition(",")
    error: float | None = metrics.get(f"{metric}{STDERR}{comma}{kind}")
    return error
