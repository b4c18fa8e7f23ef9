"""What is refused before DeepSpeed is given a model."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from torch import nn

from parallel.collectives import all_reduce
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.scatter import bit_sum
from parallel.tensor import is_cut


def require_valid(config: dict[str, Any], parallel: ParallelConfig) -> None:
    """Raises ValueError if DeepSpeed cannot read its configuration for what `parallel.engine` adds to it."""
    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
        if not parallel.engine:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"parallel.engine: {parallel.engine}; DeepSpeed refuses it: {type(error).__name__}: {reason}; correct or "
            "remove the key that it names"
        ) from error


def require_equal_weights(model: nn.Module, grid: Grid) -> None:
    """Raises ValueError if any parameter's bits sum to something else on another rank that holds the same.

    DeepSpeed would overwrite them all with the first rank's, and hide that ranks were built differently.
    """
    different: list[str] = []
    for wanted, axis in (
        (True, grid.axes["replicas"]),
        (False, grid.axes["stage"]),
    ):
        parameters = {name: p for name, p in model.named_parameters() if is_cut(p) == wanted}
        if not parameters:
            continue
        sums = torch.stack([bit_sum(p) for p in parameters.values()])  # int64
        highest, negated_lowest = all_reduce(torch.cat([sums, -sums]), axis, dist.ReduceOp.MAX).chunk(2)
        different += [name for name, equal in zip(parameters, (highest == -negated_lowest).tolist()) if not equal]
    if different:
        raise ValueError(
            f"rank {grid.rank}: initial weights differ between ranks in {len(different)} parameters, first in "
            f"{different[0]}; start all ranks with the same configuration, code and torch version"
        )
