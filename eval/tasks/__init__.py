"""The tasks of this tree, by the name that `--tasks` and `eval.tasks` use.

A task is a frozen dataclass: its fields are its settings, and `evaluate` returns its metrics (`eval/tasks/task.py`).
Adding one is its file, its test, and one line here.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from eval.tasks.bits_per_byte import BitsPerByte
from eval.tasks.generated import generated_tasks
from eval.tasks.length_extrapolation import LengthExtrapolation
from eval.tasks.multiple_choice import MultipleChoice
from eval.tasks.retrieval import Needle, Passkey
from eval.tasks.task import Task

TASKS: dict[str, type[Any]] = {
    "bits_per_byte": BitsPerByte,
    "multiple_choice": MultipleChoice,
    "length_extrapolation": LengthExtrapolation,
    "passkey": Passkey,
    "needle": Needle,
    **generated_tasks(),
}


def make_task(name: str, settings: Mapping[str, Any]) -> Task:
    """The task `name` with the settings given, each a value or, as a command line has it, its text.

    Raises:
        ValueError: there is no such task or setting, nearest names shown, or a value that it cannot have.
    """
    if name not in TASKS:
        raise ValueError(unknown_task(name, TASKS))
    kind = TASKS[name]
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in settings:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields)}"
            raise ValueError(f"{name}.{key}: there is no such setting; {hint}")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in settings]
    if missing:
        raise ValueError(f"{name}.{missing[0]}: missing; it has no default: give {name}.{missing[0]}=VALUE")
    try:
        return kind(**{key: _read(f"{name}.{key}", value, hints[key]) for key, value in settings.items()})
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{name}.") else f"{name}.{text}") from None


def check_task(name: str, task: Task, vocab_size: int, longest: int | None) -> None:
    """`task.check`, whose ValueError then names the task as well."""
    try:
        task.check(vocab_size, longest)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def unknown_task(name: str, known: Any) -> str:
    """What to say to a user who named a task that is not among the `known` ones."""
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "python -m eval --list shows all"
    return f"tasks: {name!r}; there is no such task; {hint}"


def _read(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: a plain one, one or None, or a tuple of one, which commas separate in a text."""
    options = get_args(hint)
    if type(None) in options:
        if value is None or value in ("none", "null"):
            return None
        (hint,) = (option for option in options if option is not type(None))
        return _read(key, value, hint)
    if Ellipsis in options:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise ValueError(f"{key}: {value!r}; must be a list")
        return tuple(_read(key, part, options[0]) for part in parts)
    if hint is bool and value in ("true", "false"):
        return value == "true"
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    try:
        if hint is bool or isinstance(value, bool) or (hint is int and isinstance(value, float)):
            raise ValueError
        return hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: {value!r}; must be {_WORDS.get(hint, hint.__name__)}") from None


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
