"""What checkpointed blocks send a second time, in the backward pass: all that they send forward, except the sum of
their MLP's products, which nothing in the backward pass needs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from models.lm import LM
from models.mixers.placement import OpCore
from parallel.tensor import sharded_modules
from parallel.traffic import Key, Volume, layer_of
from parallel.volume import Split, of_core


def resent(model: LM, split: Split, blocks: frozenset[int]) -> dict[Key, Volume]:
    """Of a microbatch, by the keys of `traffic_of`; `model` is whole, and `blocks` are those that run twice."""
    total: dict[Key, Volume] = {}
    layers = {f"blocks.{i}" for i in blocks}
    for key, volume in (*_of_slices(model, split, blocks), *_of_parts(model, split, layers)):
        if volume.calls:
            total[key] = total.get(key, Volume(0, 0)).plus(volume)
    return total


def _of_slices(model: LM, split: Split, blocks: frozenset[int]) -> Iterator[tuple[Key, Volume]]:
    if split.sequence == 1:
        return
    # To this rank's left there is nobody to whom anything is sent forward.
    rest = split.sequence - split.index
    onward = replace(split, sequence=rest, time=rest * split.slice_time, index=0)
    module: Any
    for i in sorted(blocks):
        for module in model.blocks[i].mixer.modules():
            core = getattr(module, "core", None)
            if not isinstance(core, OpCore):
                continue
            for operation, volume in of_core(module, core, split).items():
                if operation == "send":
                    volume = of_core(module, core, onward)["send"] if rest > 1 else Volume(0, 0)
                elif operation == "all_to_all":
                    volume = Volume(volume.calls // 2, volume.bytes // 2)
                elif operation == "reduce_scatter":
                    continue
                yield Key(f"blocks.{i}", "sequence", operation), volume


def _of_parts(model: LM, split: Split, layers: set[str]) -> Iterator[tuple[Key, Volume]]:
    if split.tensor == 1:
        return
    stream = split.tokens * model.config.width
    for prefix, module in sharded_modules(model):
        layer, sharding = layer_of(prefix), module.sharding()
        if layer not in layers:
            continue
        if split.sharded_norms and sharding.rows:
            yield Key(layer, "tensor", "all_gather"), Volume(1, stream * split.wide // split.tensor)
        if not prefix.endswith(".mlp"):
            operation = "reduce_scatter" if split.sharded_norms else "all_reduce"
            for _ in sharding.rows:
                yield Key(layer, "tensor", operation), Volume(1, stream * split.narrow)
        for _ in sharding.spanning:
            yield Key(layer, "tensor", "all_reduce"), Volume(1, split.tokens * split.wide)
