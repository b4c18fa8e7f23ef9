"""Pipeline code with one bug each, as tests/parallel/mutants.py; for ranks alone, since it imports DeepSpeed."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ops import Layout
from parallel import partition, pipeline, stages
from parallel.stages import Stages
from tests.parallel.mutants import Mutant, _patched


def _tied(held: Callable[[str], int]) -> Mutant:
    """DeepSpeed's list of what stages share, with each parameter, by its name, so many times."""

    def get(self: Any) -> list[Any]:
        pairs = dict(zip(self.tied_comms, original(self), strict=True))
        return [pair for name, pair in pairs.items() for _ in range(held(name))]

    original = pipeline.Pipeline.get_tied_weights_and_groups
    return lambda: mock.patch.object(pipeline.Pipeline, "get_tied_weights_and_groups", get)


def _second_stage_from(step: int) -> Mutant:
    """The last rank's stage begins so many blocks later than the first one ends."""

    def stages_of(model: Any, *arguments: Any) -> Stages:
        first, middle, last = original(model, *arguments).bounds
        bounds = (first, middle + step * int(dist.get_rank() > 0), last)
        return Stages(bounds, tuple(stages._held(model, bounds, index) for index in range(2)))

    original = stages.stages_of
    return lambda: mock.patch.object(partition, "stages_of", stages_of)


def _documents_in_the_first_stage_alone(positions: Tensor) -> Layout:
    return Layout(positions if dist.get_rank() == 0 else torch.arange(positions.shape[1]).expand_as(positions))


def _share_of_a_microbatch(self: Any, outputs: Any, labels: Tensor) -> Tensor:
    return _loss(self, outputs, labels) / self.num_microbatches


def _counted_by_every_stage(self: Any) -> Any:
    """What stages share is in the norm of each."""
    comms = _index(self)
    for parameter in self.parameters():
        parameter.ds_pipe_replicated = False
    return comms


_loss = pipeline.PipelinedEngine._loss
_index = pipeline.Pipeline._index_tied_modules

PIPELINE: dict[str, Mutant] = {
    "gradient of the tied embedding": _tied(lambda name: int("embed" not in name)),
    "gradient of the lower bounds": _tied(lambda name: int("lower_bounds" not in name)),
    "gradient of the lower bounds, twice": _tied(lambda name: 1 + int("lower_bounds" in name)),
    "a block twice": _second_stage_from(-1),
    "a block left out": _second_stage_from(1),
    "positions": _patched(pipeline, "Layout", _documents_in_the_first_stage_alone),
    "a microbatch's share": _patched(pipeline.PipelinedEngine, "_loss", _share_of_a_microbatch),
    "norm of what stages share, ZeRO 0": _patched(Stages, "owned_before", lambda self, index: frozenset()),
}
"""The same for two stages."""

PIPELINE_NORM: Mutant = _patched(pipeline.Pipeline, "_index_tied_modules", _counted_by_every_stage)
"""The norm of what stages share under ZeRO 1."""
