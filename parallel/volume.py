"""What one microbatch sends along the pipeline, sequence and tensor axes, derived: calls and bytes of one rank by layer
and operation, as `parallel/traffic.py` counts them.

Gradients of the weights travel on the data axis besides, those of weights that several stages hold between these, by
DeepSpeed: they depend on ZeRO's stage and on no token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.lm import LM
from models.mixers.placement import OpCore
from ops.summary import AFFINE_SUMMARIES, CELL_SUMMARIES
from parallel.stages import Stages
from parallel.tensor import sharded_modules
from parallel.traffic import Key, Volume, layer_of


@dataclass(frozen=True, kw_only=True)
class Split:
    """A microbatch and the ranks that share it.

    Attributes:
        rows, time: B and T of the whole microbatch.
        sequence, tensor: ranks of each axis.
        index: of the rank's slice; the first and the last have a neighbour on one side only.
        narrow: bytes of what matrix products leave: 2 under bf16.
        wide: bytes of the stream, of states, of statistics and of weights' gradients.
        sharded_norms: whether norms and residuals are of a share of the tokens (`parallel/regions.py`).
        corrections: of a nonlinear recurrence's start states, 1 to `sequence`; 1 for two slices.
    """

    rows: int
    time: int
    sequence: int = 1
    tensor: int = 1
    index: int = 0
    narrow: int = 2
    wide: int = 4
    sharded_norms: bool = False
    corrections: int = 1

    @property
    def slice_time(self) -> int:
        return self.time // self.sequence

    @property
    def tokens(self) -> int:
        """Of a rank's slices."""
        return self.rows * self.slice_time


def traffic_of(model: LM, split: Split, stages: Stages | None = None, index: int = 0) -> dict[Key, Volume]:
    """All that `model`, whole and possibly on the meta device, sends in a forward and backward pass of `split`; with
    `stages`, a rank of stage `index` of them."""
    stages = stages or Stages((0, len(model.blocks)), (frozenset(),))
    blocks = range(*stages.bounds[index : index + 2])
    layers = {"", *(f"blocks.{i}" for i in blocks)}
    layers |= {layer for layer, stage in (("embed", 0), ("head", stages.size - 1)) if stage == index}
    total: dict[Key, Volume] = {}
    found = (*_of_slices(model, split, blocks), *_of_parts(model, split), *_between_stages(model, split, stages, index))
    for key, volume in found:
        if volume.calls and key.layer in layers:
            total[key] = total.get(key, Volume(0, 0)).plus(volume)
    return total


def transition_entries(op: str, state: torch.Size) -> int:
    """Entries of the transition of `ops.Affine` beside states of shape `state`."""
    if op == "linear_scan":  # [B, D]
        return state.numel()
    if op == "gated_linear_attention":  # [B, H, K] for [B, H, K, V]
        return state[:-1].numel()
    if op == "gated_delta_rule":  # [B, HV, K, K] for [B, HV, K, V]
        return state[:-1].numel() * state[-2]
    assert op in CELL_SUMMARIES, op  # [B, n, n, D] for [B, n, D]
    return state.numel() * state[1]


def state_exchange(op: str, state: torch.Size, split: Split) -> dict[str, Volume]:
    """Transition and offset to all ranks, and their gradients back to those that they belong to; of nonlinear cells
    once more a correction, and beyond two ranks the largest residual, one number."""
    entries = (state.numel() + transition_entries(op, state)) // split.tensor * split.wide
    found = {"reduce_scatter": Volume(1, split.sequence * entries)}
    corrections = split.corrections if op in CELL_SUMMARIES else 0
    if corrections and split.sequence > 2:
        found["all_reduce"] = Volume(corrections, corrections * split.wide)
    return found | {"all_gather": Volume(1 + corrections, (1 + corrections) * entries)}


def hand_off(state: torch.Size, split: Split) -> dict[str, Volume]:
    """The state of each row to the next rank, its gradient to the one before."""
    one = _neighbours(split, 1, state.numel() // split.rows // split.tensor * split.wide)
    return {"send": Volume(split.rows * one.calls, split.rows * one.bytes)}


def conv_halo(channels: int, taps: int, split: Split) -> dict[str, Volume]:
    """W - 1 inputs of all channels to the next rank, their gradients to the one before."""
    if taps == 1:
        return {}
    return {"send": _neighbours(split, 1, split.rows * (taps - 1) * channels // split.tensor * split.narrow)}


def window_halo(groups: int, head_dim: int, window: int, split: Split) -> dict[str, Volume]:
    """Keys and values of window - 1 tokens to the ranks after, as many as their slices span, and gradients back."""
    total, left, distance = Volume(0, 0), window - 1, 1
    while left > 0 and distance < split.sequence:
        length = min(left, split.slice_time)
        size = 2 * split.rows * length * groups * head_dim * split.narrow
        total = total.plus(_neighbours(split, distance, size))
        left, distance = left - length, distance + 1
    return {"send": total}


def all_to_all(heads: int, groups: int, head_dim: int, split: Split) -> dict[str, Volume]:
    """Queries, keys, values and outputs of the slice, and their gradients; each rank needs a key head at least."""
    features = 2 * (heads + max(groups, split.sequence)) * head_dim
    return {"all_to_all": Volume(8, 2 * split.tokens * features * split.narrow)}


def ring_attention(groups: int, head_dim: int, split: Split) -> Volume:
    """For comparison, not built: keys and values go round, and once more with their gradients in the backward pass."""
    steps = split.sequence - 1
    return Volume(3 * steps, 3 * steps * 2 * split.tokens * groups * head_dim * split.narrow)


def _neighbours(split: Split, distance: int, size: int) -> Volume:
    calls = int(split.index + distance < split.sequence) + int(split.index >= distance)
    return Volume(calls, calls * size)


def _between_stages(model: LM, split: Split, stages: Stages, index: int) -> Iterator[tuple[Key, Volume]]:
    """The stream and the positions to the next stage, the stream's gradient to the one before."""
    stream = split.tokens * model.config.width * split.wide // (split.tensor if split.sharded_norms else 1)
    key = Key("", "pipeline", "send")
    if index < stages.size - 1:
        yield key, Volume(2, stream + 8 * split.tokens)
    if index > 0:
        yield key, Volume(1, stream)


def _of_slices(model: LM, split: Split, blocks: range) -> Iterator[tuple[Key, Volume]]:
    if split.sequence == 1:
        return
    positions_known = False
    module: Any
    for i in blocks:
        for module in model.blocks[i].mixer.modules():
            core = getattr(module, "core", None)
            if not isinstance(core, OpCore):
                continue
            for operation, volume in of_core(module, core, split).items():
                yield Key(f"blocks.{i}", "sequence", operation), volume
            if core.op.__name__ == "attention" and not positions_known:
                positions_known = True  # once a microbatch and stage, whatever the number of layers
                yield Key(f"blocks.{i}", "sequence", "all_gather"), Volume(1, 8 * split.tokens)


def of_core(module: Any, core: OpCore, split: Split) -> dict[str, Volume]:
    op = core.op.__name__
    if op == "causal_conv1d":
        channels, taps = module.weight.shape
        return conv_halo(channels, taps, split)
    if op in ("attention", "local_attention"):
        config = module.config
        heads, groups = config.heads // split.tensor, max(1, config.kv_heads // split.tensor)
        if op == "attention":
            return all_to_all(heads, groups, config.head_dim, split)
        return window_halo(groups, config.head_dim, config.window, split)
    state = module.init_state(split.rows, "meta")
    shape = (state[-1] if isinstance(state, tuple) else state).shape  # a convolution's state comes first
    if op in AFFINE_SUMMARIES or op in CELL_SUMMARIES:
        return state_exchange(op, shape, split)
    return hand_off(shape, split)


def _of_parts(model: LM, split: Split) -> Iterator[tuple[Key, Volume]]:
    if split.tensor == 1:
        return
    stream = split.tokens * model.config.width
    number = split.tokens * split.wide
    yield from _leaving("embed", stream, split.wide, split)
    yield from _entering("head", stream, split)
    # Peak, sum and label's logit of each token.
    yield Key("head", "tensor", "all_reduce"), Volume(3, 3 * number)
    cut: set[str] = set()
    for prefix, module in sharded_modules(model):
        sharding = module.sharding()
        cut |= {f"{prefix}.{name}" for name in (*sharding.cuts, *sharding.partial)}
        layer = layer_of(prefix)
        if sharding.rows:
            yield from _entering(layer, stream, split)
        for _ in sharding.rows:
            yield from _leaving(layer, stream, split.narrow, split)
        for volume in _within(module, number, split):
            yield Key(layer, "tensor", "all_reduce"), volume
    if split.sharded_norms:
        for name, parameter in model.named_parameters():
            if name not in cut | {"embed.weight", "head.weight"}:
                yield Key(layer_of(name), "tensor", "all_reduce"), Volume(1, parameter.numel() * split.wide)


def _entering(layer: str, stream: int, split: Split) -> Iterator[tuple[Key, Volume]]:
    """The input of what is cut over tensor ranks, and its gradient."""
    size = stream * split.wide
    if not split.sharded_norms:
        yield Key(layer, "tensor", "all_reduce"), Volume(1, size)
        return
    yield Key(layer, "tensor", "all_gather"), Volume(1, size // split.tensor)
    yield Key(layer, "tensor", "reduce_scatter"), Volume(1, size)


def _leaving(layer: str, stream: int, width: int, split: Split) -> Iterator[tuple[Key, Volume]]:
    """The sum of what all ranks made, in entries of `width` bytes, and its gradient."""
    size = stream * width
    if not split.sharded_norms:
        yield Key(layer, "tensor", "all_reduce"), Volume(1, size)
        return
    yield Key(layer, "tensor", "reduce_scatter"), Volume(1, size)
    yield Key(layer, "tensor", "all_gather"), Volume(1, size // split.tensor)


def _within(module: Any, number: int, split: Split) -> Iterator[Volume]:
    sharding = module.sharding()
    for _ in sharding.spanning:
        yield Volume(2, 2 * number)  # the sum of squares, and its gradient
    for name in sharding.partial:
        yield Volume(1, _entries(module, name) * split.wide)
    for name, cut in sharding.cuts.items():
        if cut.repeats and min(cut.units) < split.tensor:
            yield Volume(1, _entries(module, name) // min(cut.units) * split.wide)


def _entries(module: nn.Module, name: str) -> int:
    return module.get_parameter(name).numel()
