"""How fast a rank computes and ranks talk, in a second or two."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from parallel.axes import Axis

REPEATS = 5


def matmul_speed(device: torch.device) -> float:
    """FLOP/s of a product of square matrices, the median of a few: bf16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: a @ a, device)


def all_reduce_speed(axis: Axis, device: torch.device) -> float:
    """Bytes a second that each rank of the axis sends in an all-reduce (bus bandwidth). Collective."""
    if axis.size == 1:
        return float("inf")
    numbers = (64 << 20) if device.type == "cuda" else (1 << 18)
    tensor = torch.ones(numbers, device=device)
    seconds = _seconds(lambda: dist.all_reduce(tensor, group=axis.group), device)
    return 4 * numbers * 2 * (axis.size - 1) / axis.size / seconds


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Median time of an action, after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
