"""The options that every op on a diagonal cell takes."""

from typing import Any


def check_options(op: str, impl: str, **options: Any) -> None:
    """Raise ValueError unless segments, tolerance and max_corrections, in this order, are what `impl` can obey."""
    for (name, value), least in zip(options.items(), (1, 0, 0), strict=True):
        if value is None:
            continue
        if impl == "reference":
            raise ValueError(f"{op}: {name} is {value}; impl 'reference' has no segments: leave {name} out")
        if not value >= least:
            raise ValueError(f"{op}: {name} is {value}; must be >= {least}")
