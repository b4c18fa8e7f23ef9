"""lm-evaluation-harness's tasks: found by name, run, and as tasks like those of this tree."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.harness import lm_eval_model, read_settings
from eval.model import EvalModel
from eval.tasks import TASKS, unknown_task

BOOTSTRAPS = 1000
"""Resamplings behind the standard errors that have no formula."""


def find_tasks(names: Sequence[str], include: Path | None) -> Any:
    """The task manager that knows all of lm-eval's tasks among `names`; those below `include` are looked up first, as
    indexing all that lm-eval brings takes half a minute.

    Raises:
        ValueError: lm-eval is not installed, `include` is no directory, or a name is unknown to it and to `known`.
    """
    manager_class = _task_manager_class()
    if include is not None:
        if not include.is_dir():
            raise ValueError(f"--include: {include}; must be a directory of task YAML files")
        local = manager_class(include_path=str(include), include_defaults=False)
        if not set(names) - set(local.all_tasks):
            return local
    return manager_class(include_path=None if include is None else str(include))


def _task_manager_class() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"lm-eval is not installed ({error}); its tasks need it: pip install -c constraints.txt -e '.[eval]'"
        ) from None
    return TaskManager


@dataclass(frozen=True)
class HarnessTask:
    """One of lm-eval's tasks as `eval.tasks.task.Task`, its data loaded. `greedy` is whether it always asks for the
    most likely token."""

    name: str
    manager: Any
    generates: bool
    greedy: bool
    reads_text: bool = True

    def check(self, vocab_size: int, longest: int | None) -> None:
        """Nothing is known before its requests are."""

    def examples(self, model: EvalModel) -> Sequence[Any]:
        """The documents that it asks about."""
        tasks = self.manager.load([self.name])["tasks"].values()
        return [document for task in tasks for document in task.eval_docs]

    def evaluate(self, model: EvalModel) -> dict[str, Any]:
        """Its own metrics; of a group, those of its members under "member/metric" besides."""
        found = run_tasks(lm_eval_model(model), self.manager, [self.name])
        metrics = found.pop(self.name, {})
        return metrics | {f"{task}/{key}": value for task, values in found.items() for key, value in values.items()}


def harness_tasks(names: Sequence[str], include: Path | None) -> dict[str, HarnessTask]:
    """lm-eval's tasks by name. Raises ValueError: one is unknown, asks for what there is not, or its data are not at
    hand."""
    manager = find_tasks(names, include)
    known = set(manager.all_tasks)
    tasks = {}
    for name in names:
        if name not in known:
            raise ValueError(unknown_task(name, [*TASKS, *sorted(known)]))
        try:
            members = manager.load([name])["tasks"].values()
        except (OSError, ImportError, NotImplementedError) as error:
            raise ValueError(not_at_hand([name], error)) from error
        asked = [task.get_config("generation_kwargs") for task in members if task.OUTPUT_TYPE == "generate_until"]
        try:
            how = [read_settings(settings or {})[0] for settings in asked]
        except ValueError as error:
            raise ValueError(f"tasks: {name}: {error}") from None
        greedy = all(sampling.temperature == 0 and sampling.repetition_penalty == 1 for sampling in how)
        tasks[name] = HarnessTask(name, manager, generates=bool(asked), greedy=greedy)
    return tasks


def not_at_hand(names: Sequence[str], error: Exception) -> str:
    reason = " ".join(str(error).split())
    return (
        f"tasks {', '.join(names)}: what they need is not at hand ({type(error).__name__}: {reason}); let "
        "lm-eval fetch it with python -m eval --download"
    )


def run_tasks(
    model: Any,
    manager: Any,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """lm-eval's metrics of each of its tasks, groups and their members included: name -> metric -> value.

    Args:
        model: lm-eval's: `lm_eval_model(...)`.
        num_fewshot: examples before a question; None leaves it to the task. A task that has none stays without.
        cache: a database of answers, which serves no other model.

    Raises:
        ValueError: a task's data are not at hand, or it asks for what the model cannot do.
    """
    from lm_eval.api.model import CachingLM
    from lm_eval.evaluator import evaluate

    if cache is not None:
        model = CachingLM(model, str(cache))
    try:
        found = manager.load(list(names))
        for task in found["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (own != 0 and num_fewshot is not None):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=seed)
        results = evaluate(model, found, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAPS)["results"]
    except (OSError, ImportError, NotImplementedError) as error:
        raise ValueError(not_at_hand(names, error)) from error
    return {name: _plain(metrics) for name, metrics in results.items()}


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's "metric,filter" keys without the filter where it is the usual one, and numbers alone."""
    entries: Iterable[tuple[str, Any]] = ((key.removesuffix(",none"), value) for key, value in metrics.items())
    return {key: value for key, value in entries if isinstance(value, int | float) and not isinstance(value, bool)}
