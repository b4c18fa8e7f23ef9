"""Ranks that are only imagined: a process group whose collectives return at once, and tensors without storage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from ops import Layout
from parallel import axes
from parallel.axes import axis_sizes, make_axes
from parallel.grid import Grid


@contextmanager
def imagined_world(size: int, rank: int = 0) -> Iterator[None]:
    """Inside `with`, this process is `rank` of `size`, and nothing that it sends goes anywhere. Not inside a job: it
    takes the place of its process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a job has a process group already"
    groups, made = dict(axes._groups), set(axes._made)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        axes._groups.clear()
        axes._made.clear()
        axes._groups.update(groups)
        axes._made.update(made)


def imagined_grid(size: int, rank: int = 0, *, pipeline: int = 1, sequence: int = 1, tensor: int = 1) -> Grid:
    """The grid of `rank` among `size`, on the meta device. Process groups are made on first use."""
    sizes = axis_sizes(size, pipeline=pipeline, sequence=sequence, tensor=tensor)
    return Grid(rank=rank, world_size=size, local_rank=0, device=torch.device("meta"), axes=make_axes(rank, sizes))


def without_storage() -> FakeTensorMode:
    """Inside `with`, tensors have shapes and dtypes of a CPU's, and no entries."""
    return FakeTensorMode()


class BlankLayout(Layout):
    """A layout whose positions have no values to check."""

    def __init__(self, rows: int, time: int) -> None:
        self.positions = torch.empty(rows, time, dtype=torch.int64)
        self._derived = {}
