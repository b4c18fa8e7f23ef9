"""Parallel code with one bug each, as patches that work inside `with`: what the tests of equality must notice."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from models.mixers import MIXERS
from models.sharding import Cut
from ops import Layout
from parallel import partition, regions, sequence, tensor, vocabulary
from parallel.axes import Axis
from parallel.collectives import from_previous, gather, reduce_from
from parallel.regions import leave

Mutant = Callable[[], AbstractContextManager[Any]]


def _stated(kind: str, **changes: Any) -> Mutant:
    """The mixer's sharding table with other entries."""

    def sharding(self: Any) -> Any:
        return dataclasses.replace(original(self), **changes)

    original = MIXERS[kind].sharding
    return lambda: mock.patch.object(MIXERS[kind], "sharding", sharding)


@contextmanager
def _cut_with(part_of: Callable[[Tensor, Cut, Axis], Tensor]) -> Iterator[None]:
    with mock.patch.object(tensor, "part_of", part_of), mock.patch.object(partition, "part_of", part_of):
        yield


def _shifted_part(whole: Tensor, cut: Cut, axis: Axis) -> Tensor:
    """What a last linear map reads begins one unit late."""
    if cut.dim == 1 and not cut.fill:
        whole = whole.roll(-(whole.shape[1] // cut.units[0]), 1)
    return _part_of(whole, cut, axis)


_part_of = tensor.part_of
_rows = vocabulary._rows
_slice = vocabulary.vocabulary_slice
_incoming = sequence.incoming_state
_gather_slices = regions.gather_slices
_reduce_slices = regions.reduce_slices


def _bias_everywhere(self: Any, x: Tensor) -> Tensor:
    return leave(nn.functional.linear(x, self.weight, self.bias), self.region)


def _one_unit(self: Axis, parts: int) -> Axis:
    """A rank on its own where several hold the same unit."""
    return Axis(self.name, 0, (self.ranks[self.index],))


def _shifted_rows(vocab_size: int, axis: Axis) -> slice:
    rows = _rows(vocab_size, axis)
    return slice(rows.start + axis.index, rows.stop + axis.index)


def _with_padding(*args: Any, num_entries: int, **kwargs: Any) -> Any:
    return _slice(*args, **kwargs)


def _local_statistics(self: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
    y = nn.functional.rms_norm(x, x.shape[-1:], self.weight + int(self.one_plus_weight), self.eps)
    return y if gate is None else y * nn.functional.silu(gate)


def _one_way_statistics(self: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """The sum of squares reduced forward alone."""
    squares = reduce_from(x.square().sum(-1, keepdim=True), self.axis)
    y = x * torch.rsqrt(squares / (x.shape[-1] * self.axis.size) + self.eps) * (self.weight + int(self.one_plus_weight))
    return y if gate is None else y * nn.functional.silu(gate)


def _stateless(core: Any, axis: Axis, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
    return core(*tensors, layout=layout, initial_state=None, output_final_state=False)[0]


def _late_conv(core: Any, axis: Axis, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """The halo taken one token early."""
    x, halo = tensors[0], tensors[1].shape[1] - 1
    state = from_previous(x[:, x.shape[1] - halo - 1 : -1], axis)
    return core(*tensors, layout=layout, initial_state=state, output_final_state=False)[0]


def _no_documents(positions: Tensor, axis: Axis) -> Layout:
    rows, time = positions.shape
    return Layout(torch.arange(axis.size * time).expand(rows, -1))


def _no_transition(summary: Any, axis: Axis) -> Tensor:
    """The state that the slice before left from zero, without what came before that slice."""
    transition, offset = summary
    gathered = gather(torch.cat([transition.reshape(-1), offset.reshape(-1)]), axis)
    before = gathered[max(0, axis.index - 1), transition.numel() :].view(offset.shape)
    return before * int(axis.index > 0)


def _patched(owner: Any, name: str, value: Any) -> Mutant:
    return lambda: mock.patch.object(owner, name, value)


TENSOR: dict[str, tuple[tuple[str, ...], Mutant]] = {
    "gradient of the norm that heads share": (("gated_deltanet",), _stated("gated_deltanet", partial=())),
    "gradient of the norms of queries and keys": (("attention",), _stated("attention", partial=())),
    "gradient of a repeated key head": (("local_attention",), _patched(Axis, "part", _one_unit)),
    "statistics of a norm over ranks, HGRN2": (("hgrn2",), _stated("hgrn2", spanning=())),
    "statistics of a norm over ranks, ParaRNN": (("paralstm",), _stated("paralstm", spanning=())),
    "local statistics": (("hgrn2",), _patched(tensor.SpanningNorm, "forward", _local_statistics)),
    "gradient of statistics": (("paralstm",), _patched(tensor.SpanningNorm, "forward", _one_way_statistics)),
    "sum of the products, RG-LRU": (("rglru",), _patched(tensor, "leave", lambda x, region: x)),
    "sum of the input's gradients": (("rglru",), _patched(tensor, "enter", lambda x, region: x)),
    "bias added on every rank, RG-LRU": (("rglru",), _patched(tensor.RowLinear, "forward", _bias_everywhere)),
    "bias added on every rank, attention": (
        ("local_attention",),
        _patched(tensor.RowLinear, "forward", _bias_everywhere),
    ),
    "rows of the vocabulary": (("rglru",), _patched(vocabulary, "_rows", _shifted_rows)),
    "padding of the vocabulary": (("rglru",), _patched(vocabulary, "vocabulary_slice", _with_padding)),
    "sum of embeddings and labels' logits": (("rglru",), _patched(vocabulary, "reduce_from", lambda x, axis: x)),
    "gradient into the head": (("rglru",), _patched(vocabulary, "enter", lambda x, region: x)),
    **{
        f"boundary, {kind}": ((kind,), lambda: _cut_with(_shifted_part))
        for kind in ("rglru", "hgrn2", "gated_deltanet", "paralstm", "attention", "local_attention")
    },
}
"""What is missing or wrong: the layers in which it shows, and the patch. For two ranks."""

SEQUENCE: dict[str, tuple[tuple[str, ...], Mutant]] = {
    **{
        f"halo of the convolution, {kind}": ((kind,), _patched(sequence, "convolution", _stateless))
        for kind in ("rglru", "hgrn2", "gated_deltanet", "paralstm")
    },
    "halo one token early": (("rglru",), _patched(sequence, "convolution", _late_conv)),
    "halo of attention": (("local_attention",), _patched(sequence, "windowed_attention", _stateless)),
    "other slices of full attention": (("attention",), _patched(sequence, "full_attention", _stateless)),
    "positions of full attention": (("attention",), _patched(sequence, "_all_positions", _no_documents)),
    **{
        f"incoming state, {kind}": (
            (kind,),
            _patched(sequence, "incoming_state", lambda summary, axis: 0 * _incoming(summary, axis)),
        )
        for kind in ("rglru", "hgrn2", "gated_deltanet", "paralstm")
    },
    **{
        f"gradient of the incoming state, {kind}": (
            (kind,),
            _patched(sequence, "incoming_state", lambda summary, axis: _incoming(summary, axis).detach()),
        )
        for kind in ("rglru", "hgrn2", "gated_deltanet", "paralstm")
    },
}
"""The same for slices."""

SHARDED: dict[str, tuple[tuple[str, ...], Mutant]] = {
    "gradients of norms and biases": (("rglru",), _patched(partition, "all_reduce", lambda x, axis, layer: x)),
    "gathered one token late": (
        ("rglru",),
        _patched(regions, "gather_slices", lambda x, axis: _gather_slices(x, axis).roll(1, 1)),
    ),
    "sum of the products": (
        ("rglru",),
        _patched(regions, "reduce_slices", lambda y, axis: y.chunk(axis.size, 1)[axis.index]),
    ),
    "boundary of the tokens": (
        ("rglru",),
        _patched(regions, "reduce_slices", lambda y, axis: _reduce_slices(y.roll(-1, 1), axis)),
    ),
}
"""The same for norms and residuals of a share of the tokens, on two tensor ranks."""

CHAINED: dict[str, tuple[tuple[str, ...], Mutant]] = {
    f"transition through a slice, {kind}": ((kind,), _patched(sequence, "incoming_state", _no_transition))
    for kind in ("rglru", "hgrn2", "gated_deltanet", "paralstm")
}
"""The same for three slices, of which a state passes through the second."""
