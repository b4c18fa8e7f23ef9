"""Every arrangement of ranks that a run admits, estimated and ranked."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Protocol

from models.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.plan.blocks import Blocks
from parallel.plan.estimate import Arrangement, Estimate
from parallel.plan.hardware import Hardware
from parallel.sequence import slicing_problems
from parallel.stages import Stages, stages_of
from parallel.tensor import problems
from training.config import TrainConfig

LARGEST_SEQUENCE = 64
LARGEST_PIPELINE = 64
LARGEST_ROWS = 16
SAFE = 0.92
"""Of a GPU's memory, what a recommended arrangement takes at most: allocators leave gaps, and NCCL has buffers."""


class Data(Protocol):
    @property
    def sequence_length(self) -> int: ...


class Run(Protocol):
    """Of a run's configuration, what a plan depends on."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> Data: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...


class Planner:
    """Estimates of a run on some hardware. Inside an imagined world."""

    def __init__(self, run: Run, hardware: Hardware) -> None:
        self.run, self.hardware = run, hardware
        self.blocks = Blocks(
            run.model,
            run.data.sequence_length,
            bf16=run.train.precision == "bf16",
            sharded_norms=run.parallel.sequence_sharded_norms,
            device_type="cpu" if hardware.name == "CPU" else "cuda",
        )
        self._stages = cache(self._make_stages)
        self._fits = cache(self._divides)

    def _make_stages(self, pipeline: int, blocks: tuple[int, ...] | None) -> Stages:
        return stages_of(self.blocks.whole, self.run.data.sequence_length, pipeline, blocks)

    def estimate(self, arrangement: Arrangement) -> Estimate:
        """Of an arrangement that is admissible."""
        stages = self._stages(arrangement.parallel.pipeline, arrangement.parallel.stages)
        return Estimate(arrangement, self.blocks, stages, self.hardware)

    def as_configured(self, gpus: int) -> Estimate:
        """Of the run as it is."""
        train = self.run.train
        return self.estimate(
            Arrangement(gpus=gpus, parallel=self.run.parallel, rows=train.micro_batch_size, batch_size=train.batch_size)
        )

    def admits(self) -> bool:
        """Whether the model's sizes allow the run's own axes."""
        split = self.run.parallel
        return split.pipeline <= len(self.run.model.layers) and self._fits(split.sequence, split.tensor)

    def _divides(self, sequence: int, tensor: int) -> bool:
        time = self.run.data.sequence_length
        if tensor > 1 and problems(self.blocks.whole, tensor):
            return False
        if sequence > 1 and slicing_problems(self.blocks.whole, time, sequence, tensor):
            return False
        return not self.blocks.sharded_norms or time // sequence % tensor == 0

    def admissible(self, gpus: int) -> Iterator[Arrangement]:
        """All that the model's sizes, the batch and DeepSpeed allow on so many GPUs."""
        depth = len(self.run.model.layers)
        for tensor in _divisors(gpus, min(gpus, self.hardware.machine, 8)):
            for sequence in _divisors(gpus // tensor, LARGEST_SEQUENCE):
                if sequence & (sequence - 1) or not self._fits(sequence, tensor):
                    continue
                for pipeline in _divisors(gpus // (tensor * sequence), min(depth, LARGEST_PIPELINE)):
                    data = gpus // (tensor * sequence * pipeline)
                    for rows in self._rows(data):
                        yield from self._settings(gpus, rows, pipeline, sequence, tensor)

    def _rows(self, data: int) -> list[int]:
        """Microbatches of powers of two and as the run has them, of which a step takes a whole number."""
        batch = self.run.train.batch_size
        sizes = {1 << i for i in range(LARGEST_ROWS.bit_length())} | {self.run.train.micro_batch_size}
        return sorted(rows for rows in sizes if batch % (rows * data) == 0)

    def _settings(self, gpus: int, rows: int, pipeline: int, sequence: int, tensor: int) -> Iterator[Arrangement]:
        given = self.run.parallel
        zero = given.engine.get("zero_optimization", {})
        if pipeline > 1 and (zero.get("offload_optimizer") or zero.get("overlap_comm")):
            return
        lowest = 3 if zero.get("offload_param") else 1 if zero.get("offload_optimizer") else 0
        checkpoints: list[tuple[str, int | None]] = [("none", None), ("selective", 2), ("full", None)]
        for stage in (0, 1) if pipeline > 1 else (0, 1, 2, 3):
            if stage < lowest or (stage > 1 and gpus // (pipeline * tensor) == 1):
                continue
            for name, every in checkpoints:
                parallel = replace(
                    given,
                    pipeline=pipeline,
                    sequence=sequence,
                    tensor=tensor,
                    zero_stage=stage,
                    stages=given.stages if given.pipeline == pipeline else None,
                    sequence_sharded_norms=given.sequence_sharded_norms and tensor > 1,
                    activation_checkpointing=name,  # type: ignore[arg-type]
                    checkpointed_mixers=(),
                    checkpointed_every=every,
                )
                yield Arrangement(gpus=gpus, parallel=parallel, rows=rows, batch_size=self.run.train.batch_size)

    def ranked(self, gpus: int) -> tuple[list[Estimate], list[Estimate]]:
        """Those that fit, the fastest first; and those that do not, the smallest first."""
        fitting: list[Estimate] = []
        too_large: list[Estimate] = []
        for arrangement in self.admissible(gpus):
            estimate = self.estimate(arrangement)
            (fitting if estimate.bytes <= SAFE * self.hardware.memory else too_large).append(estimate)
        fitting.sort(key=lambda found: (found.times.step, found.bytes))
        too_large.sort(key=lambda found: found.bytes)
        return fitting, too_large

    def best(self, gpus: int, count: int) -> Sequence[Estimate]:
        return self.ranked(gpus)[0][:count]


def _divisors(number: int, largest: int) -> list[int]:
    return [n for n in range(1, min(number, largest) + 1) if number % n == 0]
