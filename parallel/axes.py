"""The four axes of the process grid, pipeline x data x sequence x tensor, and the process group along each."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch.distributed as dist

AXES = ("pipeline", "data", "sequence", "tensor")
"""From the slowest to the fastest: tensor ranks are neighbours, since they exchange most."""

_groups: dict[tuple[int, ...], Any] = {}
"""Process groups of this rank by their global ranks, made once."""

_made: set[tuple[int, ...]] = set()
"""Global ranks of the groups that `make_groups` made, the same on all ranks."""


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one along one axis alone, itself among them.

    Attributes:
        name: of the axis.
        index: this rank's place in `ranks`.
        ranks: global ranks, in the order of the axis.
    """

    name: str
    index: int
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def group(self) -> Any:
        """The process group. Collective over the axis on the first use of one that `make_groups` did not make, for
        ranks that are in equally many groups."""
        if self.size == dist.get_world_size():
            return dist.group.WORLD
        if self.ranks not in _groups:
            _groups[self.ranks] = dist.new_group(list(self.ranks), use_local_synchronization=True)
        return _groups[self.ranks]

    def part(self, parts: int) -> "Axis":
        """Of `parts` equal runs of neighbours along the axis, the one this rank is in."""
        length = self.size // parts
        first = self.index // length * length
        return Axis(self.name, self.index - first, self.ranks[first : first + length])


def axis_sizes(world_size: int, *, pipeline: int, sequence: int, tensor: int) -> dict[str, int]:
    """Ranks along each axis by name, the data axis taking what the other three leave.

    Raises:
        ValueError: the ranks do not divide by the three.
    """
    taken = pipeline * sequence * tensor
    if world_size % taken:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(
            f"parallel.pipeline x parallel.sequence x parallel.tensor: {pipeline} x {sequence} x {tensor}; must divide "
            f"the {world_size} ranks: choose a product among {fitting}, or start a multiple of {taken} ranks"
        )
    return {"pipeline": pipeline, "data": world_size // taken, "sequence": sequence, "tensor": tensor}


def make_axes(rank: int, sizes: dict[str, int]) -> dict[str, Axis]:
    """The axes of `rank` in a grid of `sizes` (by AXES), and two that span several: `replicas`, data and sequence, over
    which parameters are replicated and gradients averaged; and `stage`, all ranks of this one's pipeline stage."""
    coordinates, rest = {}, rank
    for name in reversed(AXES):
        rest, coordinates[name] = divmod(rest, sizes[name])
    assert rest == 0, (rank, sizes)
    axes = {}
    several = {"replicas": ("data", "sequence"), "stage": ("data", "sequence", "tensor")}
    for name, spanned in ({name: (name,) for name in AXES} | several).items():
        places = product(*(range(sizes[key]) if key in spanned else (coordinates[key],) for key in AXES))
        ranks = tuple(_rank(place, sizes) for place in places)
        axes[name] = Axis(name, ranks.index(rank), ranks)
    return axes


def connect(sizes: dict[str, int]) -> None:
    """Makes the groups of a grid of `sizes`, and of the runs of tensor ranks that `part` gives. Collective over all."""
    world = [make_axes(rank, sizes) for rank in range(math.prod(sizes.values()))]
    for name in world[0]:
        size = world[0][name].size
        parts = [n for n in range(2, size) if size % n == 0] if name == "tensor" else []
        make_groups(axis.ranks for axes in world for axis in (axes[name], *(axes[name].part(n) for n in parts)))


def make_groups(groups: Iterable[tuple[int, ...]]) -> None:
    """Makes the process groups of these global ranks, all of them on every rank in the same order. Collective over all.

    Members that make theirs alone, on first use, meet under a name that torch forms from the number of groups each is
    in: where that differs, as among stages of which some share a parameter, they wait for each other for ever.
    """
    for ranks in groups:
        if len(ranks) < dist.get_world_size() and ranks not in _made:
            _made.add(ranks)
            group = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                _groups[ranks] = group


def _rank(place: tuple[int, ...], sizes: dict[str, int]) -> int:
    rank = 0
    for name, index in zip(AXES, place):
        rank = rank * sizes[name] + index
    return rank
