"""Tasks on a trained model: `python -m eval MODEL --tasks a,b`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.load import default_device, device_here
from eval.tasks import TASKS, check_task, make_task, unknown_task
from eval.tasks.task import Task
from models.checkpoint import META

if TYPE_CHECKING:
    from eval.open_model import Opened

EPILOG = """examples:
  python -m eval runs/demo --tasks bits_per_byte --set bits_per_byte.path=README.md
  python -m eval runs/demo --tasks lambada_openai,hellaswag --num-fewshot 0 --cache runs/demo/answers
  python -m eval HF_DIR --tasks my_task --include my_tasks/
  python -m eval --list ruler
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.list is None or options.check) and (options.model is None or not options.tasks):
        parser.error("MODEL and --tasks are needed, or --list to see the tasks")
    for key in ("batch_size", "limit"):
        value = getattr(options, key)
        if value is not None and value < 1:
            parser.error(f"--{key.replace('_', '-')}: {value}; must be at least 1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "0" if options.download else "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if options.download else "1")
    try:
        if options.list is not None:
            list_tasks(options.list, options.include)
        else:
            evaluate(options)
    except (ValueError, OSError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Everything that can be refused is, before the model is loaded; with --check what can be without one."""
    ours, theirs, manager = choose_tasks(options.tasks, options.set, options.include)
    if options.check:
        for name, task in ours.items():
            check_task(name, task, vocab_size=sys.maxsize, longest=None)
        return
    if not options.model.is_dir():
        raise ValueError(f"{options.model}: no such directory; name a run, a checkpoint or a Hugging Face directory")
    output = options.output or default_output(options.model)
    if options.output is not None and not output.parent.is_dir():
        raise ValueError(f"--output: {output}; its directory must exist")
    from eval.open_model import open_model

    opened = open_model(
        options.model,
        options.device or default_device(),
        batch_size=options.batch_size,
        trust_remote_code=options.trust_remote_code,
    )
    print(f"{opened.description}: {', '.join([*ours, *theirs])}", file=sys.stderr)
    for name, task in ours.items():
        require_text(name, task, opened.model)
        check_task(name, task, opened.model.vocab_size, opened.model.longest)
    results = {name: task.evaluate(opened.model) for name, task in ours.items()}
    if theirs:
        require_text(", ".join(theirs), None, opened.model)
        results |= _by_harness(opened, manager, theirs, options)
    record = {
        "model": opened.description,
        "digest": opened.digest,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {name: vars(task) for name, task in ours.items()}
        | {"num_fewshot": options.num_fewshot, "limit": options.limit, "seed": options.seed},
        "results": results,
    }
    output.parent.mkdir(exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(output)
    print(json.dumps(record) if options.json else table(results))
    print(f"written to {output}", file=sys.stderr)


def _by_harness(
    opened: "Opened", manager: Any, names: Sequence[str], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    from eval.harness import lm_eval_model
    from eval.harness_tasks import run_tasks

    cache = None
    if options.cache is not None:
        options.cache.mkdir(parents=True, exist_ok=True)
        cache = options.cache / opened.digest[:16]
    settings = {"num_fewshot": options.num_fewshot, "limit": options.limit, "seed": options.seed}
    return run_tasks(lm_eval_model(opened.model), manager, names, cache=cache, **settings)


def require_text(names: str, task: Task | None, model: Any) -> None:
    if model.tokenizer is None and (task is None or task.reads_text):
        raise ValueError(
            f"tasks {names}: need text, but the model was trained on tokens without a tokenizer; put its "
            "tokenizer.model into the checkpoint"
        )


def choose_tasks(
    names: Sequence[str], settings: Sequence[str], include: Path | None
) -> tuple[dict[str, Task], list[str], Any]:
    """Tasks of this tree by name, the names of lm-eval's, and its task manager if there are any.

    Raises:
        ValueError: an unknown task or setting, or a setting of a task that is not asked for.
    """
    given: dict[str, dict[str, str]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        name, dot, field = key.partition(".")
        if not equals or not dot or name not in names or name not in TASKS:
            ours = ", ".join(name for name in names if name in TASKS) or "none of the tasks asked for"
            raise ValueError(f"--set: {setting!r}; must be TASK.KEY=VALUE with a task of this tree: {ours}")
        given.setdefault(name, {})[field] = value
    theirs = [name for name in dict.fromkeys(names) if name not in TASKS]
    tasks = {name: make_task(name, given.get(name, {})) for name in dict.fromkeys(names) if name in TASKS}
    if not theirs:
        return tasks, [], None
    from eval.harness_tasks import find_tasks

    manager = find_tasks(theirs, include)
    known = set(manager.all_tasks)
    for name in theirs:
        if name not in known:
            raise ValueError(unknown_task(name, [*TASKS, *sorted(known)]))
    return tasks, theirs, manager


def default_output(model: Path) -> Path:
    """results.json in a run or Hugging Face directory; of a checkpoint, whose files are sealed, a file with its name in
    the run's evaluations/, or beside it where it is no run's."""
    if not (model / META).is_file():
        return model / "results.json"
    model = model.resolve()
    if model.parent.name != "checkpoints":
        return model.with_name(f"{model.name}.results.json")
    return model.parent.parent / "evaluations" / f"{model.name}.json"


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line a metric, with its standard error where there is one."""
    lines = [("task", "metric", "value", "standard error")]
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if "_stderr" in metric or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr", "")
            lines.append((task, metric, _number(value), _number(error)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def list_tasks(pattern: str, include: Path | None) -> None:
    """The tasks whose names contain `pattern`: of this tree with what they are, and of lm-eval."""
    for name, task in TASKS.items():
        if pattern in name:
            print(f"{name:<24} {(task.__doc__ or '').strip().splitlines()[0]}")
    from eval.harness_tasks import find_tasks

    print("indexing lm-eval's tasks takes half a minute", file=sys.stderr)
    for name in sorted(find_tasks([""], include).all_tasks):
        if pattern in name:
            print(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description="Evaluate a model on tasks of this tree and of lm-evaluation-harness.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL", help="run directory, checkpoint, or Hugging Face directory")
    add("--tasks", type=lambda text: [name for name in text.split(",") if name], metavar="A,B", help="names (--list)")
    add("--set", action="append", default=[], metavar="TASK.KEY=VALUE", help="a setting of a task of this tree")
    add("--include", type=Path, metavar="DIR", help="directory of further lm-eval task YAML files")
    add(
        "--output", type=Path, metavar="FILE", help="where results go; RUN/evaluations/STEP.json, or MODEL/results.json"
    )
    add("--batch-size", type=int, default=8, metavar="N", help="rows at a time; changes speed, not scores (8)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question of lm-eval's tasks")
    add("--limit", type=int, metavar="N", help="take only N examples of each of lm-eval's tasks")
    add("--cache", type=Path, metavar="DIR", help="keep lm-eval's answers there, so that a killed evaluation goes on")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of few-shot examples (0)")
    add("--device", type=device_here, help="cpu or cuda; a GPU if there is one")
    add("--download", action="store_true", help="let lm-eval fetch data; without, they must be at hand")
    add("--trust-remote-code", action="store_true", help="run the Python files of a Hugging Face directory")
    add("--json", action="store_true", help="print results.json instead of the table")
    add("--check", action="store_true", help="look at tasks and options and leave; MODEL need not be there yet")
    add("--list", nargs="?", const="", metavar="TEXT", help="show the tasks, those with TEXT in their name, and leave")
    return parser


if __name__ == "__main__":
    sys.exit(main())
