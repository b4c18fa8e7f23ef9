"""What modules tell about their last call, for the run's log."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def module_metrics(model: nn.Module) -> dict[str, float]:
    """By name, the largest of the figures that modules of the model give by `metrics() -> {name: scalar tensor}`.

    They are of this rank's last microbatch. All are read from the device at once, so that only who asks waits for it.
    """
    values: dict[str, list[Tensor]] = {}
    for module in model.modules():
        tell = getattr(module, "metrics", None)
        for name, value in (tell() if callable(tell) else {}).items():
            values.setdefault(name, []).append(value)
    if not values:
        return {}
    largest = torch.stack([torch.stack(figures).max() for figures in values.values()])
    return dict(zip(values, largest.tolist()))


def largest(of_ranks: Iterable[dict[str, float]]) -> dict[str, float]:
    """By name, the largest figure that any rank has: of cut layers and of stages each rank knows its own alone."""
    values: dict[str, list[float]] = {}
    for figures in of_ranks:
        for name, value in figures.items():
            values.setdefault(name, []).append(value)
    return {name: max(found) for name, found in values.items()}
