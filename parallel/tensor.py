"""Tensor parallelism: heads, channels and hidden units over ranks, from outside, by the tables that modules state.

Megatron-LM's scheme (arXiv 1909.08053): what enters a mixer or MLP is equal on all ranks, each works on its part, the
last linear map's products are summed. Backward, the input's gradients are summed. The stream between stays whole, or
is cut along T (`parallel/regions.py`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from models.lm import LM
from models.sharding import Cut, Sharding
from parallel.axes import Axis
from parallel.collectives import copy_to, reduce_from
from parallel.regions import Region, enter, leave


def shard_tensors(model: LM, region: Region) -> tuple[dict[str, Cut], dict[str, Axis]]:
    """Cuts the model's parameters in place, a rank's part staying, and joins the parts where they meet.

    Returns, by the parameters' names in the model, the cuts of those that are cut, and of those that several ranks hold
    alike but use each in its own way the ranks over which their gradients are to be summed.
    """
    cuts: dict[str, Cut] = {}
    summed: dict[str, Axis] = {}
    axis = region.axis
    if axis.size == 1:
        return cuts, summed
    for prefix, module in list(sharded_modules(model)):
        sharding: Sharding = module.sharding()
        for name, cut in sharding.cuts.items():
            held = axis.part(min(cut.units)) if cut.repeats and min(cut.units) < axis.size else None
            part = part_of(module.get_parameter(name).detach(), cut, axis)
            _replace(module, name, part, counts=held is None or held.index == 0)
            cuts[f"{prefix}.{name}"] = cut
            if held is not None:
                summed[f"{prefix}.{name}"] = held
        summed |= {f"{prefix}.{name}": axis for name in sharding.partial}
        _join(module, sharding, region)
    return cuts, summed


def sharded_modules(model: LM) -> Iterator[tuple[str, Any]]:
    """The outermost modules that state a sharding, by name."""
    found: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "sharding") and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield name, module


def part_of(whole: Tensor, cut: Cut, axis: Axis) -> Tensor:
    """This rank's part of a whole parameter, a tensor of its own."""
    if cut.fill:
        missing = -whole.shape[cut.dim] % axis.size
        shape = [missing if dim == cut.dim else size for dim, size in enumerate(whole.shape)]
        whole = torch.cat([whole, whole.new_zeros(shape)], dim=cut.dim)
    parts = []
    for part, units in zip(whole.split(_sizes(whole, cut), dim=cut.dim), cut.units, strict=True):
        held, index = _share(units, cut, axis.size, axis.index)
        parts.append(part.chunk(held, dim=cut.dim)[index])
    return torch.cat(parts, dim=cut.dim)


def whole_of(parts: Sequence[Tensor], cut: Cut, shape: torch.Size) -> Tensor:
    """The parameter of `shape` of which `parts` are all ranks' parts, in the order of the axis."""
    size = len(parts)
    totals = cut.sizes or (shape[cut.dim] + (-shape[cut.dim] % size if cut.fill else 0),)
    held = [_share(units, cut, size, 0)[0] for units in cut.units]
    split = [part.split([total // n for total, n in zip(totals, held)], dim=cut.dim) for part in parts]
    columns = []
    for k, n in enumerate(held):
        columns += [pieces[k] for pieces in split[:: size // n]]
    return torch.cat(columns, dim=cut.dim).narrow(cut.dim, 0, shape[cut.dim])


def _sizes(whole: Tensor, cut: Cut) -> list[int]:
    return list(cut.sizes or (whole.shape[cut.dim],))


def _share(units: int, cut: Cut, size: int, index: int) -> tuple[int, int]:
    """Into how many pieces a part of `units` falls over `size` ranks, and which of them is that of rank `index`."""
    if cut.repeats and units < size:
        return units, index * units // size
    return size, index


def _fits(units: int, cut: Cut, size: int) -> bool:
    return units % size == 0 or (cut.repeats and size % units == 0)


def problems(model: LM, size: int) -> list[str]:
    """Why the model cannot be cut over `size` tensor ranks, each reason once and with the sizes that work."""
    obstacles: dict[str, None] = {}
    indivisible: dict[str, list[str]] = {}  # parameters by what is wrong with them
    for prefix, module in sharded_modules(model):
        sharding = module.sharding()
        if sharding.obstacle is not None:
            obstacles[f"{type(module).__name__}: {sharding.obstacle}"] = None
        for name, cut in sharding.cuts.items():
            for units in cut.units:
                if not _fits(units, cut, size):
                    fitting = ", ".join(str(n) for n in range(1, max(units, size) + 1) if _fits(units, cut, n))
                    reason = f"{units} units do not divide over {size} ranks; fitting: {fitting}"
                    indivisible.setdefault(reason, []).append(f"{prefix}.{name}")
    named = (
        f"{first}{f' and {len(others)} more' if others else ''}: {reason}"
        for reason, (first, *others) in indivisible.items()
    )
    return [*obstacles, *named]


def mark_cut(parameter: nn.Parameter, *, counts: bool) -> None:
    """Notes that this rank holds a part. It counts in the gradient's norm unless a rank before this one holds the same.

    DeepSpeed asks for `tensor_model_parallel`: parameters without it count on the first tensor rank alone.
    """
    parameter.is_part = True  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = counts  # type: ignore[attr-defined]


def copy_marks(source: nn.Parameter, target: nn.Parameter) -> None:
    if is_cut(source):
        mark_cut(target, counts=counts(source))


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a part of it only."""
    return getattr(parameter, "is_part", False)


def counts(parameter: nn.Parameter) -> bool:
    """Whether a part counts in the gradient's norm."""
    return getattr(parameter, "tensor_model_parallel", False)


def _replace(module: nn.Module, name: str, value: Tensor, *, counts: bool) -> None:
    owner, _, attribute = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=module.get_parameter(name).requires_grad)
    mark_cut(parameter, counts=counts)
    holder = module.get_submodule(owner)
    setattr(holder, attribute, parameter)
    if isinstance(holder, nn.Linear):
        holder.out_features, holder.in_features = holder.weight.shape


def _join(module: nn.Module, sharding: Sharding, region: Region) -> None:
    for name in sharding.rows:
        _put(module, name, RowLinear(module.get_submodule(name), region))
    for name in sharding.spanning:
        _put(module, name, SpanningNorm(module.get_submodule(name), region.axis))
    if sharding.rows:
        module.register_forward_pre_hook(lambda module, arguments: (enter(arguments[0], region), *arguments[1:]))


def _put(module: nn.Module, name: str, replacement: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, replacement)


class RowLinear(nn.Module):
    """A linear map of which each rank holds some input features: y = sum over ranks of x W^T, + bias."""

    def __init__(self, linear: Any, region: Region) -> None:
        super().__init__()
        self.weight, self.bias, self.region = linear.weight, linear.bias, region
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = leave(nn.functional.linear(x, self.weight), self.region)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SpanningNorm(nn.Module):
    """An RMS norm over features that lie on several ranks: the sum of squares is theirs together."""

    def __init__(self, norm: Any, axis: Axis) -> None:
        super().__init__()
        self.weight, self.eps, self.one_plus_weight, self.axis = norm.weight, norm.eps, norm.one_plus_weight, axis

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Summed forward and backward: each rank goes on with the same number in its own way.
        squares = copy_to(reduce_from(wide.square().sum(-1, keepdim=True), self.axis), self.axis)
        y = wide * torch.rsqrt(squares / (x.shape[-1] * self.axis.size) + self.eps)
        y = y * (self.weight + 1 if self.one_plus_weight else self.weight)
        if gate is not None:
            y = y * silu(gate.to(y.dtype))
        return y.to(x.dtype)
