"""The four axes of the process grid, pipeline x data x sequence x tensor, and the process group along each."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch.distributed as dist

AXES = ("pipeline", "data", "sequence", "tensor")
"""From the slowest to the fastest: tensor ranks are neighbours, since they exchange most."""

_groups: dict[tuple[int, ...], Any] = {}
"""Process groups of this rank by their global ranks, made once."""


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
        """The process group. Collective over the axis on its first use."""
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


def make_axes(rank: int, sizes: dict[str, int]) -> dict[str, Axis]:
    """The axes of `rank` in a grid of `sizes` (by AXES), and `replicas`: the data and sequence axes taken together,
    over which parameters are replicated and gradients averaged."""
    coordinates, rest = {}, rank
    for name in reversed(AXES):
        rest, coordinates[name] = divmod(rest, sizes[name])
    assert rest == 0, (rank, sizes)
    axes = {}
    for name, spanned in (*((name, (name,)) for name in AXES), ("replicas", ("data", "sequence"))):
        places = product(*(range(sizes[key]) if key in spanned else (coordinates[key],) for key in AXES))
        ranks = tuple(_rank(place, sizes) for place in places)
        axes[name] = Axis(name, ranks.index(rank), ranks)
    return axes


def _rank(place: tuple[int, ...], sizes: dict[str, int]) -> int:
    rank = 0
    for name, index in zip(AXES, place):
        rank = rank * sizes[name] + index
    return rank
