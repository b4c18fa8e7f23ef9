"""A model cut over the pipeline, tensor and sequence axes, and how its parameters' parts become whole again."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.init import initial_values
from models.lm import LM
from models.sharding import Cut
from parallel.axes import Axis
from parallel.collectives import all_reduce
from parallel.compiled import compile_blocks
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.recompute import checkpoint_blocks
from parallel.regions import Region
from parallel.scatter import Scatter
from parallel.sequence import shard_sequence, slicing_problems
from parallel.stages import Stages, keep_stage, stages_of
from parallel.tensor import copy_marks, part_of, problems, shard_tensors, whole_of
from parallel.traffic import layer_of
from parallel.vocabulary import shard_vocabulary


@dataclass(frozen=True)
class Partition:
    """Which parameters are cut over the tensor axis, and what shapes they have as a whole.

    Attributes:
        axis: the tensor axis.
        shapes: of all parameters, whole, by name.
        cuts: of those that are cut.
        stages: which pipeline rank holds which parameters; None where there is one.
    """

    axis: Axis
    shapes: dict[str, torch.Size]
    cuts: dict[str, Cut]
    stages: Stages | None = None

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole tensor that belongs to the parameter `name`."""
        return part_of(whole, self.cuts[name], self.axis) if name in self.cuts else whole

    def whole(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor, from the parts of all tensor ranks."""
        return whole_of(parts, self.cuts[name], self.shapes[name])


def build_model(
    config: ModelConfig, grid: Grid, *, seed: int, sequence_length: int, parallel: ParallelConfig | None = None
) -> tuple[LM, LM, Partition]:
    """A rank's share of the model, on the grid's device, from the weights that one process starts from.

    No rank ever holds more of it than its share and one whole tensor, under ZeRO 3 of `parallel` a share of the weights
    too.

    Returns:
        The share; the whole model without storage, on the meta device, for its tables and sizes; and the partition.

    Raises:
        ValueError: the model does not divide over the tensor or pipeline axis, or its rows over the sequence axis.
    """
    model, blueprint, partition, summed = cut_model(config, grid, sequence_length=sequence_length, parallel=parallel)
    assert partition.stages is not None
    names = partition.stages.names[grid.axes["pipeline"].index]
    scatter = Scatter(grid, parallel) if parallel is not None and parallel.zero_stage == 3 else None
    _fill(model, initial_values(blueprint, seed, names), partition, grid.device, scatter)
    for name, ranks in ((name, ranks) for name, ranks in summed.items() if name in names):
        add_up = partial(all_reduce, axis=ranks, layer=layer_of(name))
        model.get_parameter(name).register_hook(add_up)
    return model, blueprint, partition


def cut_model(
    config: ModelConfig,
    grid: Grid,
    *,
    sequence_length: int,
    parallel: ParallelConfig | None = None,
    device_type: str | None = None,
) -> tuple[LM, LM, Partition, dict[str, Axis]]:
    """A rank's share of the model without storage, on the meta device; what else `build_model` returns; and of which
    parameters the gradients are to be summed over which ranks. Raises what it raises.

    Args:
        device_type: where the model will run, if not on the grid's device.
    """
    axis = grid.axes["tensor"]
    with torch.device("meta"):
        blueprint, model = (LM(config, device_type=device_type or grid.device.type) for _ in range(2))
    slices = grid.axes["sequence"]
    if axis.size > 1 and (reasons := problems(blueprint, axis.size)):
        raise ValueError(f"parallel.tensor: {axis.size}; " + "; ".join(reasons))
    if slices.size > 1 and (reasons := slicing_problems(blueprint, sequence_length, slices.size, axis.size)):
        raise ValueError(f"parallel.sequence: {slices.size}; " + "; ".join(reasons))
    if parallel is not None and parallel.sequence_sharded_norms and sequence_length // slices.size % axis.size:
        needed = slices.size * axis.size
        raise ValueError(
            f"parallel.sequence_sharded_norms: true; data.sequence_length: {sequence_length}; must be a multiple of "
            f"parallel.sequence x parallel.tensor, {needed}: choose e.g. "
            f"{max(1, round(sequence_length / needed)) * needed}, or leave it out"
        )
    pipeline = grid.axes["pipeline"]
    stages = stages_of(blueprint, sequence_length, pipeline.size, parallel.stages if parallel is not None else None)
    shapes = {name: parameter.shape for name, parameter in blueprint.named_parameters()}
    region = Region(axis, sliced=parallel is not None and parallel.sequence_sharded_norms)
    cuts, summed = shard_tensors(model, region)
    cuts |= shard_vocabulary(model, region)
    if region.sliced:  # what is whole sees a rank's tokens alone
        summed = {name: axis for name in shapes if name not in cuts} | summed
    partition = Partition(axis, shapes, cuts, stages)
    shard_sequence(model, slices)
    keep_stage(model, stages, pipeline.index)
    if parallel is not None:
        if parallel.compile:
            compile_blocks(model, grid.device.type)
        checkpoint_blocks(model, parallel)
    return model, blueprint, partition, summed


@torch.no_grad()
def _fill(
    model: LM,
    values: Iterable[tuple[str, Tensor]],
    partition: Partition,
    device: torch.device,
    scatter: Callable[[nn.Parameter], None] | None,
) -> None:
    """Gives one parameter after the other storage and its part of the values; one that several modules share stays one.

    With `scatter`, a parameter is passed to it before the next one gets storage.
    """
    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((module, attribute))
    for name, value in values:
        blank = model.get_parameter(name)
        parameter = nn.Parameter(partition.part(name, value).to(device))
        copy_marks(blank, parameter)
        if scatter is not None:
            scatter(parameter)
        for module, attribute in holders.pop(blank):
            setattr(module, attribute, parameter)
    assert not holders, "parameters without initial values"
