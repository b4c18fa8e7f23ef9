"""Host memory that a save takes: a rank's share and one tensor."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.grid import Grid
from tests.parallel.tiny import tiny_engine


class Storages(TorchDispatchMode):
    """Most bytes that tensors made while it is active held at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known | self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self._known.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.alive -= size


def measure_memory(grid: Grid, directory: Path) -> list[tuple[int, ...]]:
    """For each ZeRO stage: parameters, elements of the largest, bytes kept by a save, most that two take."""
    from parallel.snapshot import HostCopies

    found = []
    for stage in (0, 1, 2, 3):
        state = tiny_engine(grid, zero_stage=stage).state
        sizes = [state.shapes[name].numel() for name in state.names]
        copies = HostCopies()
        with Storages() as storages:
            kept = copies.take(grid, state)
        assert copies.num_bytes == sum(t.nbytes for t in kept.values())
        with Storages() as again:
            copies.take(grid, state)
        found.append((sum(sizes), max(sizes), copies.num_bytes, storages.peak, again.peak))
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_rank_holds_more_than_its_share_and_a_tensor(ranks, tmp_path, size):
    of_ranks = ranks(size).run(measure_memory, directory=tmp_path)
    for found in of_ranks:
        for total, largest, kept, peak, again in found:
            assert kept <= 12 * total / size + 4 * largest
            # What DeepSpeed gathers with, and what it is gathered from, are of one tensor each.
            assert peak <= 12 * total / size + 3 * 4 * largest
            assert again <= 3 * 4 * largest, "the second save writes over the first"
    for stage_figures in zip(*of_ranks, strict=True):
        assert sum(kept for _, _, kept, *_ in stage_figures) == 12 * stage_figures[0][0], "each tensor is kept once"


def test_the_measure_of_memory_sees_a_gathered_model():
    with Storages() as storages:
        whole = [torch.zeros(1000) for _ in range(5)]
        del whole
        torch.zeros(10)
    assert storages.peak == 20_000
    assert storages.alive == 0
