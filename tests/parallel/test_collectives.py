"""Each exchange beside what one process computes from all ranks' tensors: results, and gradients of every input."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import axes
from parallel.axes import AXES, make_axes
from parallel.collectives import all_reduce, copy_to, exchange, from_previous, gather, receive, reduce_from, send
from parallel.grid import Grid
from parallel.vocabulary import log_sum_exp_over

SHAPE = (2, 6, 6, 3)


def inputs(size: int) -> list[Tensor]:
    """Of each rank, not contiguous."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(SHAPE[::-1], generator=generator, dtype=torch.float64) for _ in range(size)]
    return [x.permute(3, 2, 1, 0).requires_grad_() for x in drawn]


def weights(rank: int, like: Tensor) -> Tensor:
    """By which a rank's result counts in its loss; not contiguous."""
    draw = torch.randn(like.shape[::-1], generator=torch.Generator().manual_seed(rank + 1), dtype=like.dtype)
    return draw.permute(*range(like.dim() - 1, -1, -1))


def _handed(x: Tensor, axis: Any) -> Tensor:
    """Each rank passes on its x and what it got."""
    got = receive(torch.empty_like(x), axis) if axis.index else torch.zeros_like(x)
    y = x + 2 * got
    return send(y * 3, y, axis) if axis.index < axis.size - 1 else y * 3


TOGETHER: dict[str, Callable[..., Tensor]] = {
    "gather": gather,
    "exchange heads for tokens": lambda x, axis: exchange(x, axis, split=2, join=1),
    "exchange tokens for heads": lambda x, axis: exchange(x, axis, split=1, join=2),
    "from_previous": from_previous,
    "from_previous, two before": lambda x, axis: from_previous(x, axis, 2),
    "send and receive": _handed,
}


def _exchanged(xs: list[Tensor], split: int, join: int) -> list[Tensor]:
    return [torch.cat([x.chunk(len(xs), split)[rank] for x in xs], dim=join) for rank in range(len(xs))]


def _shifted(xs: list[Tensor], distance: int) -> list[Tensor]:
    return [xs[rank - distance] if rank >= distance else 0 * xs[0] for rank in range(len(xs))]


def _chain(xs: list[Tensor]) -> list[Tensor]:
    states = [xs[0]]
    for x in xs[1:]:
        states.append(x + 2 * states[-1])
    return [3 * state for state in states]


ALONE: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "gather": lambda xs: [torch.stack(xs)] * len(xs),
    "exchange heads for tokens": lambda xs: _exchanged(xs, 2, 1),
    "exchange tokens for heads": lambda xs: _exchanged(xs, 1, 2),
    "from_previous": lambda xs: _shifted(xs, 1),
    "from_previous, two before": lambda xs: _shifted(xs, 2),
    "send and receive": _chain,
}


def on_ranks(grid: Grid) -> dict[str, tuple[Tensor, Tensor]]:
    """Result and gradient of this rank's x, where the loss is the sum of all ranks'."""
    axis = grid.arranged(sequence=grid.world_size).axes["sequence"]
    found = {}
    for name, function in TOGETHER.items():
        x = inputs(axis.size)[axis.index]
        y = function(x, axis)
        (y * weights(axis.index, y)).sum().backward()
        assert x.grad is not None
        found[name] = y.detach(), x.grad
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_exchanges_have_the_gradients_of_one_process(ranks: Any, size: int) -> None:
    of_ranks = ranks(size).run(on_ranks)
    for name, function in ALONE.items():
        xs = inputs(size)
        ys = function(xs)
        gradients = torch.autograd.grad(sum((y * weights(i, y)).sum() for i, y in enumerate(ys)), xs, allow_unused=True)
        for (y, dx), wanted, gradient in zip((found[name] for found in of_ranks), ys, gradients, strict=True):
            torch.testing.assert_close(y, wanted.detach(), msg=name)
            torch.testing.assert_close(dx, torch.zeros_like(dx) if gradient is None else gradient, msg=name)


def between_regions(grid: Grid) -> list[Tensor]:
    """x, equal on all ranks, into work of each rank's own and back; and the log-sum-exp of slices, one of them empty.

    The loss is one number, the same on all ranks.
    """
    axis = grid.arranged(tensor=grid.world_size).axes["tensor"]
    x = inputs(1)[0]
    y = reduce_from(torch.tanh((axis.index + 1) * copy_to(x, axis)), axis)
    (y * weights(0, y)).sum().backward()
    assert x.grad is not None
    slices = torch.arange(4.0, dtype=torch.float64) * 300 if axis.index == 0 else torch.full((4,), -torch.inf).double()
    slices.requires_grad_()
    total = log_sum_exp_over(slices, axis)
    (total * torch.arange(1.0, 5.0)).sum().backward()
    assert slices.grad is not None
    return [y.detach(), x.grad, total.detach(), slices.grad]


def test_regions_of_different_work_have_the_gradients_of_one_process(ranks: Any) -> None:
    x = inputs(1)[0]
    wanted = torch.tanh(x) + torch.tanh(2 * x)
    (wanted * weights(0, wanted)).sum().backward()
    for rank, (y, dx, total, share) in enumerate(ranks(2).run(between_regions)):
        torch.testing.assert_close(y, wanted.detach())
        torch.testing.assert_close(dx, x.grad)
        torch.testing.assert_close(total, torch.arange(4.0, dtype=torch.float64) * 300)
        torch.testing.assert_close(share, torch.arange(1.0, 5.0, dtype=torch.float64) * (rank == 0))


def after_unequal_groups(grid: Grid) -> list[float]:
    """Sums over every axis of a grid whose groups are made when some ranks are in more groups than others."""
    dist.new_group([0, 3])  # as stages are that share a parameter
    with mock.patch.dict(axes._groups, clear=True), mock.patch.object(axes, "_made", set()):
        on = grid.arranged(pipeline=2, tensor=2)
        return [float(all_reduce(torch.tensor(1.0 + grid.rank), axis)) for axis in on.axes.values()]


def test_groups_meet_where_ranks_have_been_in_unequally_many(ranks: Any) -> None:
    names = [*make_axes(0, dict.fromkeys(AXES, 1))]
    for rank, found in enumerate(ranks(4).run(after_unequal_groups, timeout=60.0)):
        wanted = dict.fromkeys(names, 1.0 + rank)
        wanted |= {"pipeline": 2.0 + rank % 2 + rank % 2 + 2, "tensor": 3.0 if rank < 2 else 7.0}
        assert dict(zip(names, found, strict=True)) == wanted | {"stage": wanted["tensor"]}
