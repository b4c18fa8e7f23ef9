"""Which rank keeps which tensor of a checkpoint, and the host memory that it keeps them in."""

import heapq
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from models.checkpoint import KINDS, Kind, tensor_key
from parallel.grid import Grid
from parallel.state import TrainingState

T = TypeVar("T")


def owners(sizes: Mapping[T, int], num_ranks: int) -> dict[T, int]:
    """An owner among `num_ranks` for each item: the largest first, to the rank with the least so far.

    So no rank owns more than its share and one item.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    chosen = {}
    for item, size in sorted(sizes.items(), key=lambda pair: (-pair[1], str(pair[0]))):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, rank))
        chosen[item] = rank
    return chosen


def tensor_owners(state: TrainingState, names: tuple[str, ...], num_ranks: int) -> dict[tuple[Kind, str], int]:
    """The ranks of a stage that keep the weights and moments of its parameters."""
    shapes = state.shapes
    return owners({(kind, name): shapes[name].numel() for name in names for kind in KINDS}, num_ranks)


class HostCopies:
    """What this rank saves, in host memory that stays from one save to the next.

    It is known after the first save how much it takes, and the pages are there already at the second.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @torch.no_grad()
    def take(self, grid: Grid, state: TrainingState) -> dict[str, Tensor]:
        """Copies what this rank owns, by stored name. Collective; tensors become whole one at a time.

        What was taken before is overwritten.
        """
        axis = grid.axes["stage"]
        taken = {}
        chosen = tensor_owners(state, state.owned, axis.size)
        for kind, name in sorted(chosen, key=lambda item: state.owned.index(item[1])):
            whole = state.gather(name, kind)
            if chosen[kind, name] == axis.index:
                taken[tensor_key(kind, name)] = self._copy(tensor_key(kind, name), whole)
            del whole  # before the next is made
        self._tensors = taken
        return dict(taken)

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        copy = self._tensors.get(key)
        if copy is None or copy.shape != tensor.shape:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        return copy.copy_(tensor)
