"""Exchanges along one axis, with the backward that makes gradients those of one process.

Along an axis of one rank all are the identity and send nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axes import Axis
from parallel.traffic import record, running_layer


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """x, equal on all ranks, into work that differs between them: their gradients are summed."""
    return _Copy.apply(x, axis) if axis.size > 1 else x


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """The sum of all ranks' x, whose gradient is equal on all."""
    return _Reduce.apply(x, axis) if axis.size > 1 else x


def gather(x: Tensor, axis: Axis) -> Tensor:
    """[ranks, *x.shape]: everybody's x; the gradient that a rank gets is the sum of what all ranks found for its x."""
    return _Gather.apply(x, axis) if axis.size > 1 else x.unsqueeze(0)


def gather_slices(x: Tensor, axis: Axis) -> Tensor:
    """[B, T, ...] of all ranks' [B, T / ranks, ...]; their gradients are summed, and each rank gets its own slice's."""
    return _GatherSlices.apply(x, axis) if axis.size > 1 else x


def reduce_slices(x: Tensor, axis: Axis) -> Tensor:
    """This rank's [B, T / ranks, ...] of the sum of all ranks' x [B, T, ...]; the gradients of all slices come back."""
    return _ReduceSlices.apply(x, axis) if axis.size > 1 else x


def exchange(x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
    """Cut x along dim `split` into one part a rank, hand each rank its part, and join what arrives along `join`."""
    return _Exchange.apply(x, axis, split, join) if axis.size > 1 else x


def from_previous(x: Tensor, axis: Axis, distance: int = 1) -> Tensor:
    """The x of the rank `distance` before this one, zeros on the first; its gradient travels back."""
    return _Shift.apply(x, axis, distance) if axis.size > 1 else torch.zeros_like(x)


def receive(like: Tensor, axis: Axis) -> Tensor:
    """What the rank before this one passes to `send`, shaped as `like`; its gradient travels back there."""
    return _Receive.apply(like.requires_grad_(), axis)


def send(y: Tensor, x: Tensor, axis: Axis) -> Tensor:
    """y as it is; x goes to the next rank, and its gradient comes back in the backward pass of y."""
    return _Send.apply(y, x, axis)


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM, layer: str | None = None) -> Tensor:
    """The reduction of all ranks' x in a tensor of its own, outside autograd; `layer` as in `record`."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    if axis.size > 1:
        record(axis, "all_reduce", x, layer)
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[ranks, *x.shape], outside autograd."""
    x = x.detach().contiguous()
    if axis.size == 1:
        return x.unsqueeze(0)
    record(axis, "all_gather", x)
    gathered = x.new_empty(axis.size, *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1) if x.dim() else gathered, x if x.dim() else x[None], axis.group)
    return gathered


def _join_slices(x: Tensor, axis: Axis, layer: str) -> Tensor:
    x = x.contiguous()
    record(axis, "all_gather", x, layer)
    slices = x.new_empty(axis.size, *x.shape)
    dist.all_gather_into_tensor(slices.flatten(0, 1), x, axis.group)
    return torch.cat(slices.unbind(0), dim=1)


def _sum_slices(x: Tensor, axis: Axis, layer: str) -> Tensor:
    slices = torch.stack(x.chunk(axis.size, dim=1))
    record(axis, "reduce_scatter", slices, layer)
    own = torch.empty_like(slices[0])
    dist.reduce_scatter_tensor(own.view(-1), slices.view(-1), group=axis.group)
    return own


class _GatherSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.layer = axis, running_layer()
        return _join_slices(x, axis, ctx.layer)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _sum_slices(dx, ctx.axis, ctx.layer), None


class _ReduceSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.layer = axis, running_layer()
        return _sum_slices(x, axis, ctx.layer)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _join_slices(dx, ctx.axis, ctx.layer), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.layer = axis, running_layer()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return all_reduce(dx, ctx.axis, layer=ctx.layer), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.layer = axis, running_layer()
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        axis, dx = ctx.axis, dx.contiguous()
        record(axis, "reduce_scatter", dx, ctx.layer)
        own = dx.new_empty(dx.shape[1:])
        dist.reduce_scatter_tensor(own.view(-1), dx.view(-1), group=axis.group)
        return own, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
        ctx.arguments, ctx.layer = (axis, split, join), running_layer()
        return _all_to_all(x, axis, split, join, ctx.layer)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        axis, split, join = ctx.arguments
        return _all_to_all(dx, axis, join, split, ctx.layer), None, None, None


def _all_to_all(x: Tensor, axis: Axis, split: int, join: int, layer: str) -> Tensor:
    parts = torch.stack(x.chunk(axis.size, dim=split))
    record(axis, "all_to_all", parts, layer)
    arrived = torch.empty_like(parts)
    dist.all_to_all_single(arrived, parts, group=axis.group)
    return torch.cat(arrived.unbind(0), dim=join)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, distance: int) -> Tensor:
        ctx.arguments, ctx.layer = (axis, distance), running_layer()
        return _send(x, axis, distance, ctx.layer)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        axis, distance = ctx.arguments
        return _send(dx, axis, -distance, ctx.layer), None, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.layer = axis, running_layer()
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(x, axis.ranks[axis.index - 1], axis.group)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None]:
        record(ctx.axis, "send", dx, ctx.layer)
        dist.send(dx.contiguous(), ctx.axis.ranks[ctx.axis.index - 1], ctx.axis.group)
        return None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.like = axis, torch.empty_like(x, memory_format=torch.contiguous_format)
        record(axis, "send", x)
        dist.send(x.contiguous(), axis.ranks[axis.index + 1], axis.group)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        dist.recv(ctx.like, ctx.axis.ranks[ctx.axis.index + 1], ctx.axis.group)
        return dy, ctx.like, None


def _send(x: Tensor, axis: Axis, distance: int, layer: str) -> Tensor:
    """Send x to the rank `distance` after this one; what the rank `distance` before it sent, zeros where none is."""
    x = x.contiguous()
    received = torch.zeros_like(x)
    works = []
    if 0 <= axis.index + distance < axis.size:
        record(axis, "send", x, layer)
        works.append(dist.P2POp(dist.isend, x, axis.ranks[axis.index + distance], axis.group))
    if 0 <= axis.index - distance < axis.size:
        works.append(dist.P2POp(dist.irecv, received, axis.ranks[axis.index - distance], axis.group))
    for work in dist.batch_isend_irecv(works) if works else []:
        work.wait()
    return received
