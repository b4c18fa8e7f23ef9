"""Sequence parallelism: one row's tokens cut into slices, one a rank, around mixers that know nothing of it.

A mixer calls its op through `core`; here cores are replaced by ones that find out what the slices before theirs leave
behind, and hand it to the op as its initial state:

- linear recurrences: each rank sums its slice up as an affine map of the state (`ops.Affine`), one all-gather, and each
  composes the maps of the ranks before it (LASP-2, arXiv 2502.07563, for every decay);
- diagonal nonlinear cells: the same maps, linearised around guessed states, corrected until the states agree: multiple
  shooting over ranks;
- any other recurrence, and cells whose states do not settle: the state from rank to rank, row by row;
- convolutions and windowed attention: the last inputs, keys and values before the slice;
- full attention: all-to-all, each rank has all tokens of some heads (DeepSpeed Ulysses, arXiv 2309.14509).

What travels does not grow with the length of the slice, except for full attention. Only `positions` say which slice
continues a document.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.mixers.placement import OpCore
from ops import Affine, Layout
from ops.summary import AFFINE_SUMMARIES, CELL_SUMMARIES
from parallel.axes import Axis
from parallel.collectives import all_gather, all_reduce, exchange, from_previous, gather, receive, send

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Largest disagreement of the states where slices of a nonlinear recurrence meet; states are of order one."""


def incoming_state(summary: Affine, axis: Axis) -> Tensor:
    """The state before this rank's slice, from every rank's summary of its own and zeros before the first. Collective.

    Differentiable; the transition and the offset travel in one tensor.
    """
    transition, offset = summary
    gathered = gather(torch.cat([transition.reshape(-1), offset.reshape(-1)]), axis)
    # An empty sum: on the first rank, too, the state hangs on the all-gather, whose backward pass takes every rank.
    state = torch.zeros_like(offset) + gathered[0, :0].sum()
    for part in gathered[: axis.index]:
        a, b = part.split([transition.numel(), offset.numel()])
        state = Affine(a.view(transition.shape), b.view(offset.shape))(state)
    return state


def slicing_problems(model: nn.Module, sequence_length: int, size: int, tensor: int) -> list[str]:
    """Why rows of `sequence_length` tokens cannot be cut into `size` slices, each reason once; `model` is whole, and
    cut over `tensor` ranks besides."""
    if sequence_length % size:
        nearest = max(1, round(sequence_length / size)) * size
        return [f"data.sequence_length: {sequence_length}; must be a multiple of it: choose e.g. {nearest}"]
    reasons: dict[str, None] = {}
    module: Any
    for module in model.modules():
        core = getattr(module, "core", None)
        name = core.op.__name__ if isinstance(core, OpCore) else None
        if name == "causal_conv1d" and module.weight.shape[1] - 1 > sequence_length // size:
            reasons[
                f"slices of {sequence_length // size} tokens, where a convolution looks back "
                f"{module.weight.shape[1] - 1}; use fewer ranks or a longer data.sequence_length"
            ] = None
        if name == "attention":
            heads, groups = module.config.heads // tensor, max(1, module.config.kv_heads // tensor)
            if not _divides(size, heads, groups):
                fitting = ", ".join(str(n) for n in range(1, heads + 1) if _divides(n, heads, groups))
                reasons[
                    f"full attention has {heads} heads on {groups} key and value heads a rank; choose among {fitting}"
                ] = None
    return list(reasons)


def _divides(size: int, heads: int, groups: int) -> bool:
    return heads % size == 0 and max(groups, size) % min(groups, size) == 0


class SequenceCore(nn.Module):
    """A core whose tensors are this rank's slice, and whose results are what one process would have in that slice.

    Attributes:
        whole_rows: while it is set, every rank has whole rows, and nothing is exchanged.
    """

    def __init__(self, core: OpCore, axis: Axis) -> None:
        super().__init__()
        self.core, self.axis = core, axis
        self.whole_rows = False

    @property
    def impl(self) -> str:
        return self.core.impl

    def forward(
        self, *tensors: Tensor, layout: Layout | None, initial_state: Any = None, output_final_state: bool = False
    ) -> tuple[Tensor, Any]:
        if self.whole_rows:
            return self.core(
                *tensors, layout=layout, initial_state=initial_state, output_final_state=output_final_state
            )
        if initial_state is not None or output_final_state or layout is None:
            raise ValueError(
                "state: given or asked for under sequence parallelism, which trains on whole rows; generate inside "
                "`parallel.generation.generating`"
            )
        return run(self.core, self.axis, tensors, layout), None


def shard_sequence(model: nn.Module, axis: Axis) -> None:
    """Replaces every core in `model`, in place. Each rank's model then takes its slice of every row."""
    if axis.size == 1:
        return
    for module in list(model.modules()):
        core = getattr(module, "core", None)
        if isinstance(core, OpCore):
            module.core = SequenceCore(core, axis)


def run(core: OpCore, axis: Axis, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """The output of `core` in this rank's slice. Collective."""
    special = {"causal_conv1d": convolution, "local_attention": windowed_attention, "attention": full_attention}
    name = core.op.__name__
    if name in special:
        return special[name](core, axis, tensors, layout)
    state: Tensor | None
    if name in AFFINE_SUMMARIES:
        state = incoming_state(AFFINE_SUMMARIES[name](*tensors, layout=layout), axis)
    else:
        state = shoot(CELL_SUMMARIES[name], axis, tensors, layout) if name in CELL_SUMMARIES else None
        if state is None:
            return hand_off(core, axis, tensors, layout)
    return core(*tensors, layout=layout, initial_state=state, output_final_state=False)[0]


def shoot(summarise: Callable[..., Affine], axis: Axis, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor | None:
    """The state before this rank's slice of a nonlinear recurrence. Collective; one all-gather a correction.

    All ranks run their slices side by side from guessed states, and correct them through the slices' linearisations
    until what each slice leaves is what the next started from; the first k slices have theirs after k - 1 corrections.
    The last linearisation, around the states found, carries the gradients: where a state agrees with the one it was
    linearised at, the transition's own gradient multiplies zero.

    None, on all ranks alike, where the states do not settle: where a slice's Jacobian magnifies rounding itself.
    """
    state: Tensor | None = None
    with torch.no_grad():
        for _ in range(axis.size):
            found = incoming_state(summarise(*tensors, layout=layout, initial_state=state), axis)
            moved = (found if state is None else found - state).abs().max()
            state = found
            if axis.size == 2 or all_reduce(moved, axis, dist.ReduceOp.MAX) <= TOLERANCE[found.dtype]:
                break
        else:
            return None
    return incoming_state(summarise(*tensors, layout=layout, initial_state=state), axis)


def convolution(core: OpCore, axis: Axis, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """The last W - 1 inputs of the slice before are the state."""
    x, weight = tensors[:2]
    halo = weight.shape[1] - 1
    assert x.shape[1] >= halo, (x.shape, weight.shape)
    state = from_previous(x[:, x.shape[1] - halo :], axis) if halo else None
    return core(*tensors, layout=layout, initial_state=state, output_final_state=False)[0]


def windowed_attention(core: OpCore, axis: Axis, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """The keys and values of the window - 1 tokens before the slice are the state, from as many slices as they span.

    Before the row's first token there are zeros that no position lets a query see.
    """
    _, k, v = tensors
    time, halo = k.shape[1], core.settings["window"] - 1
    pieces: list[Tensor] = []
    for distance in range(1, min(axis.size - 1, -(-halo // time)) + 1):
        length = min(time, halo - (distance - 1) * time)
        pieces.insert(0, from_previous(torch.stack([z[:, time - length :] for z in (k, v)]), axis, distance))
    state = tuple(torch.cat(pieces, dim=2).unbind(0)) if pieces else None
    return core(*tensors, layout=layout, initial_state=state, output_final_state=False)[0]


def full_attention(core: OpCore, axis: Axis, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """All tokens of H / ranks heads; where there are fewer key and value heads than ranks, each goes to several."""
    q, k, v = tensors
    groups = k.shape[2]
    if groups < axis.size:
        k, v = (z.repeat_interleave(axis.size // groups, dim=2) for z in (k, v))
    q, k, v = (exchange(z, axis, split=2, join=1) for z in (q, k, v))
    whole = layout.derive(_all_positions, axis)
    o, _ = core(q, k, v, layout=whole, initial_state=None, output_final_state=False)
    return exchange(o, axis, split=1, join=2)


def _all_positions(positions: Tensor, axis: Axis) -> Layout:
    return Layout(torch.cat(all_gather(positions, axis).unbind(0), dim=1))


def hand_off(core: OpCore, axis: Axis, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """Any recurrence at all: each rank waits for the state that the slice before leaves. Row by row, so that the ranks
    work side by side, each on a row of its own."""
    rows = layout.positions.shape[0]
    of_rows = [_has_tokens(z, layout) for z in tensors]
    like = _final_state(core, tensors, layout)[:1]
    outputs = []
    for row in range(rows):
        part = tuple(z[row : row + 1] if cut else z for z, cut in zip(tensors, of_rows))
        here = Layout(layout.positions[row : row + 1])
        state = None
        if axis.index > 0:
            state = receive(torch.empty_like(like), axis)
        y, state = core(*part, layout=here, initial_state=state, output_final_state=True)
        outputs.append(y if axis.index == axis.size - 1 else send(y, state, axis))
    return torch.cat(outputs)


def _final_state(core: OpCore, tensors: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """Something of the shape, dtype and device of the state that `core` leaves: one token is enough to find out."""
    first = [z[:, :1] if _has_tokens(z, layout) else z for z in tensors]
    with torch.no_grad():
        here = Layout(torch.zeros_like(layout.positions[:, :1]))
        return core(*first, layout=here, initial_state=None, output_final_state=True)[1]


def _has_tokens(z: Tensor, layout: Layout) -> bool:
    """Whether z is `[B, T, ...]`. Ops take two kinds of tensors: those, and weights of at most two dimensions."""
    return z.dim() > 2 and z.shape[:2] == layout.positions.shape
