"""What travels between ranks, counted where it is sent: bytes and calls by layer, axis and operation."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from parallel.axes import Axis


class Key(NamedTuple):
    """
    Attributes:
        layer: as `layer_of` names it; empty outside of all layers.
        axis: of the process grid, by name.
        operation: all_reduce, all_gather, reduce_scatter, all_to_all or send.
    """

    layer: str
    axis: str
    operation: str


class Volume(NamedTuple):
    """Calls of one rank, and the bytes of the tensors that it handed to them, its own part among them."""

    calls: int
    bytes: int

    def plus(self, other: "Volume") -> "Volume":
        return Volume(self.calls + other.calls, self.bytes + other.bytes)


class Traffic:
    """What one rank sent, added up."""

    def __init__(self) -> None:
        self.bytes: Counter[Key] = Counter()
        self.calls: Counter[Key] = Counter()

    def record(self, key: Key, tensor: Tensor) -> None:
        self.bytes[key] += tensor.numel() * tensor.element_size()
        self.calls[key] += 1

    @property
    def volumes(self) -> dict[Key, Volume]:
        return {key: Volume(self.calls[key], self.bytes[key]) for key in self.calls}


def summary(volumes: dict[Key, Volume]) -> str:
    """Calls and bytes of each axis and operation, over all layers."""
    total: dict[tuple[str, str], Volume] = {}
    for key, volume in volumes.items():
        total[key.axis, key.operation] = total.get((key.axis, key.operation), Volume(0, 0)).plus(volume)
    found = [
        f"{axis} {operation}: {v.calls} calls, {v.bytes:,} bytes" for (axis, operation), v in sorted(total.items())
    ]
    return "; ".join(found) or "nothing beside the gradients"


def by_layer(volumes: dict[Key, Volume]) -> dict[str, dict[str, dict[str, int]]]:
    """Calls and bytes of each layer, under `axis operation`; as JSON takes it."""
    layers: dict[str, dict[str, dict[str, int]]] = {}
    for key, volume in volumes.items():
        layers.setdefault(key.layer, {})[f"{key.axis} {key.operation}"] = volume._asdict()
    return layers


_counters: list[Traffic] = []
_layers: list[str] = [""]
"""The layers whose forward pass is running, the innermost last."""


def layer_of(name: str) -> str:
    """The layer that owns the parameter or module called `name`: `embed`, `blocks.3`, `head`, `shared.hgrn2`."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in ("blocks", "shared") else 1])


def running_layer() -> str:
    """Whose forward pass is running. Backward, ask for it in the forward pass and keep it."""
    return _layers[-1]


@contextmanager
def running_in(layer: str) -> Iterator[None]:
    """Inside `with`, what runs belongs to `layer`: for a forward pass that is repeated outside of its module's call."""
    _layers.append(layer)
    try:
        yield
    finally:
        _layers.pop()


@contextmanager
def counted(model: nn.Module) -> Iterator[Traffic]:
    """Counts what the collectives of `parallel/collectives.py` send while it is active, in forward and backward.

    Args:
        model: whose layers they are counted by.
    """
    traffic = Traffic()
    hooks = []
    for name, module in model.named_modules():
        if name and layer_of(name) == name:
            hooks.append(module.register_forward_pre_hook(_enter(name)))
            hooks.append(module.register_forward_hook(_leave, always_call=True))
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)
        for hook in hooks:
            hook.remove()


def record(axis: Axis, operation: str, tensor: Tensor, layer: str | None = None) -> None:
    """Adds one call that sends `tensor` to every active count; `layer` is the running one if None."""
    for counter in _counters:
        counter.record(Key(running_layer() if layer is None else layer, axis.name, operation), tensor)


def _enter(layer: str) -> Any:
    return lambda module, arguments: _layers.append(layer)


def _leave(module: nn.Module, arguments: Any, output: Any) -> None:
    _layers.pop()
