"""A model cut over the tensor and sequence axes, and how its parameters' parts become whole again."""

from collections.abc import Sequence
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
from parallel.grid import Grid
from parallel.sequence import shard_sequence, slicing_problems
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
    """

    axis: Axis
    shapes: dict[str, torch.Size]
    cuts: dict[str, Cut]

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole tensor that belongs to the parameter `name`."""
        return part_of(whole, self.cuts[name], self.axis) if name in self.cuts else whole

    def whole(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor, from the parts of all tensor ranks."""
        return whole_of(parts, self.cuts[name], self.shapes[name])


def build_model(config: ModelConfig, grid: Grid, *, seed: int, sequence_length: int) -> tuple[LM, LM, Partition]:
    """A rank's share of the model, on the grid's device, from the weights that one process starts from.

    No rank ever holds more of it than its share and one whole tensor.

    Returns:
        The share; the whole model without storage, on the meta device, for its tables and sizes; and the partition.

    Raises:
        ValueError: the model does not divide over the tensor axis, or its rows over the sequence axis.
    """
    axis = grid.axes["tensor"]
    with torch.device("meta"):
        blueprint, model = (LM(config, device_type=grid.device.type) for _ in range(2))
    slices = grid.axes["sequence"]
    if axis.size > 1 and (reasons := problems(blueprint, axis.size)):
        raise ValueError(f"parallel.tensor: {axis.size}; " + "; ".join(reasons))
    if slices.size > 1 and (reasons := slicing_problems(blueprint, sequence_length, slices.size, axis.size)):
        raise ValueError(f"parallel.sequence: {slices.size}; " + "; ".join(reasons))
    shapes = {name: parameter.shape for name, parameter in blueprint.named_parameters()}
    cuts, summed = shard_tensors(model, axis)
    partition = Partition(axis, shapes, cuts | shard_vocabulary(model, axis))
    shard_sequence(model, slices)
    _materialise(model, grid.device)
    for name, ranks in summed.items():
        add_up = partial(all_reduce, axis=ranks, layer=layer_of(name))
        model.get_parameter(name).register_hook(add_up)
    with torch.no_grad():
        for name, values in initial_values(blueprint, seed):
            model.get_parameter(name).copy_(partition.part(name, values))
    return model, blueprint, partition


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Gives every parameter storage; one that several modules share stays one, where `to_empty` would make several."""
    real: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in real:
                real[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
                copy_marks(parameter, real[parameter])
            setattr(module, name, real[parameter])
