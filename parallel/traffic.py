"""What travels between ranks, counted where it is sent: bytes and calls by axis and operation."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from parallel.axes import Axis


class Traffic:
    """Bytes that this rank contributed, and calls, by (axis, operation)."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def record(self, axis: Axis, operation: str, tensor: Tensor) -> None:
        key = (axis.name, operation)
        self.bytes[key] += tensor.numel() * tensor.element_size()
        self.calls[key] += 1


_counters: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what the collectives of `parallel/collectives.py` send while it is active, in forward and backward."""
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


def record(axis: Axis, operation: str, tensor: Tensor) -> None:
    """Adds one call that sends `tensor` to every active count."""
    for counter in _counters:
        counter.record(axis, operation, tensor)
