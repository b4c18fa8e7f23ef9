"""How long a rank takes for what it does without the others, to find the one that all wait for."""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn


class OwnTime:
    """Sums a rank's time in the forward passes of training, and what is added by hand, for example waiting for data.

    The step itself takes equally long on all ranks, as each waits for the slowest; forward passes wait for nobody
    under ZeRO 0 to 2, and for those that share the layers or rows under tensor and sequence ranks. On a GPU the time is
    that of the device, between events that are read after the step has waited for the device anyway.

    Args:
        module: whose calls are timed, in training mode.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds, self._steps = 0.0, 0
        self._start: Any = None
        self._events: list[tuple[Any, Any]] = []
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._finish)

    def add(self, seconds: float) -> None:
        """Seconds besides; once a step."""
        self._seconds += seconds
        self._steps += 1

    def take(self) -> float:
        """Seconds a step since the last call. The device has done its work up to the last step."""
        self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        mean = self._seconds / max(1, self._steps)
        self._events.clear()
        self._seconds, self._steps = 0.0, 0
        return mean

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        if module.training:
            self._start = self._now()

    def _finish(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not module.training:
            return
        if self._on_gpu:
            self._events.append((self._start, self._now()))
        else:
            self._seconds += self._now() - self._start

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stragglers:
    """Finds the rank that all wait for.

    Args:
        hosts: every rank's machine.
        slow_factor: a rank is named once it takes so many times the median of the ranks of its pipeline stage.
    """

    def __init__(self, hosts: Sequence[str], slow_factor: float) -> None:
        self._hosts, self._slow_factor = hosts, slow_factor
        self._named: int | None = None

    def compare(self, seconds: Sequence[float], stages: Sequence[int]) -> tuple[dict[str, Any], str | None]:
        """Figures for the log, and whom to name where that is somebody else than the last time.

        Args:
            seconds: every rank's own time, a step.
            stages: every rank's pipeline stage; stages have different work.
        """
        medians = {stage: median(s for s, other in zip(seconds, stages) if other == stage) for stage in stages}
        ratios = [s / max(medians[stage], 1e-9) for s, stage in zip(seconds, stages)]
        rank = max(range(len(ratios)), key=ratios.__getitem__)
        figures = {
            "own_time": median(seconds),
            "own_time_max": seconds[rank],
            "slowest_rank": rank,
            "slowest_host": self._hosts[rank],
        }
        before, self._named = self._named, rank if ratios[rank] > self._slow_factor else None
        if self._named in (None, before):
            return figures, None
        return figures, (
            f"rank {rank} on {self._hosts[rank]} takes {seconds[rank]:.3f} s a step for its own work, the median of "
            f"{len(seconds)} ranks is {medians[stages[rank]]:.3f} s"
        )
