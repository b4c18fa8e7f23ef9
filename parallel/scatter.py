"""ZeRO 3's weights: each parameter is scattered over the ranks that would otherwise hold the same as soon as it has its
values, so that a rank holds its share of all and never more than one whole."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from parallel.config import ParallelConfig
from parallel.grid import Grid


class Scatter:
    """Scatters parameters, one a call. Nothing is sent: every rank has the whole one and keeps its share.

    Args:
        grid: the ranks; shares are those of the axis `replicas`.
        parallel: `engine.zero_optimization.offload_param` says where shares lie.
    """

    def __init__(self, grid: Grid, parallel: ParallelConfig) -> None:
        from deepspeed.runtime.zero import Init

        offload = parallel.engine.get("zero_optimization", {}).get("offload_param", {})
        self._device = grid.device
        self._init = Init(
            data_parallel_group=grid.axes["replicas"].group,
            dtype=torch.float32,
            remote_device=offload.get("device"),
            pin_memory=offload.get("pin_memory", False),
        )

    def __call__(self, parameter: nn.Parameter) -> None:
        parameter.bit_sum = bit_sum(parameter)  # type: ignore[attr-defined]
        # `Init(module=...)` does the same after a broadcast, which would hide that ranks were built differently.
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        _clear_padding(parameter)


def scatter_all(model: nn.Module, grid: Grid, parallel: ParallelConfig) -> None:
    """Scatters the parameters that are not yet, one after the other."""
    scatter = Scatter(grid, parallel)
    for parameter in model.parameters():
        if not is_scattered(parameter):
            scatter(parameter)


def is_scattered(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def bit_sum(parameter: Tensor) -> Tensor:
    """Sum of the bits of a whole fp32 tensor as integers; of a scattered parameter that of its initial values."""
    if is_scattered(parameter):
        return parameter.bit_sum  # type: ignore[attr-defined]
    assert parameter.dtype == torch.float32, "parameters are fp32 in every precision"
    return parameter.detach().view(torch.int32).sum()


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside `with`, scattered parameters are whole, to be read. Collective over the axis `replicas`."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter for parameter in parameters if is_scattered(parameter)])


def share_of(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """What this rank keeps of a whole value of a scattered parameter: equal runs of entries, filled up with zeros."""
    share: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    size = share.ds_numel
    rank: int = parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
    flat = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(flat, (0, size - len(flat)))


def _clear_padding(parameter: nn.Parameter) -> None:
    """DeepSpeed leaves what fills up the last share as it finds it, NaN included."""
    share: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    rank: int = parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
    held = min(share.ds_numel, max(0, parameter.ds_numel - rank * share.ds_numel))  # type: ignore[attr-defined]
    share[held:].zero_()
