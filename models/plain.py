"""Dataclasses from the plain values that `dataclasses.asdict` made of them."""

import dataclasses
from typing import Any, get_args, get_type_hints


def from_plain(kind: Any, value: Any, key: str = "") -> Any:
    """What `dataclasses.asdict` took apart, after JSON, as an instance of the dataclass `kind` again.

    Args:
        key: where the value stands, for errors.

    Raises:
        ValueError: a key is unknown or missing, or the dataclass refuses its values.
    """
    dataclass: Any = next((option for option in (kind, *get_args(kind)) if dataclasses.is_dataclass(option)), None)
    if dataclass is None or not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    hints = get_type_hints(dataclass)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise ValueError(f"{prefix}{name}: {value[name]!r}; no such setting, choose from {', '.join(hints)}")
    for entry in dataclasses.fields(dataclass):
        bare = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if bare and entry.name not in value:
            raise ValueError(f"{prefix}{entry.name}: missing; add it")
    return dataclass(**{name: from_plain(hints[name], inner, f"{prefix}{name}") for name, inner in value.items()})
