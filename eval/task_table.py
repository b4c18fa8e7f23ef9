"""What the evaluation tasks of a run found, for its report."""

from collections.abc import Sequence
from typing import NamedTuple

from eval.run_record import Row

PREFIX = "task/"


class TaskLine(NamedTuple):
    """A metric of a task over a run: the first and the last value, and the steps they are of."""

    task: str
    metric: str
    first_step: int
    first: float
    last_step: int
    last: float


def task_table(rows: Sequence[Row]) -> list[TaskLine]:
    """A line for each metric that is a number, in the order in which they came.

    Args:
        rows: with keys `task/NAME/METRIC`, in the order they were written. After a resume steps come again: what lay
            beyond them no longer counts.
    """
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        step = row["step"]
        for found in values.values():
            for later in [known for known in found if known >= step]:
                del found[later]
        for key, value in row.items():
            if key.startswith(PREFIX) and isinstance(value, int | float):
                values.setdefault(key, {})[step] = value
    lines = []
    for key, found in values.items():
        if found:
            task, _, metric = key.removeprefix(PREFIX).partition("/")
            first, last = min(found), max(found)
            lines.append(TaskLine(task, metric, first, found[first], last, found[last]))
    return lines
