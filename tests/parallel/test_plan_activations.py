"""What the planner says passes keep and hold at most, against passes with data: within 15 %, for every mixer."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from models.lm import LM
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.plan.trace import Tracer
from parallel.plan.world import imagined_world
from parallel.recompute import checkpoint_blocks, checkpointed_blocks
from tests.parallel.mixed import config_of, loss_of
from tests.parallel.plans import planner_of

MIXERS = ("rglru", "hgrn2", "local_attention", "gated_deltanet", "paralstm", "attention")
TIME, ROWS, DEPTH = 192, 2, 3
"""Not the sizes that the planner runs: a row of 192 tokens, where it looks at 96 and 192 of one row."""
CHECKPOINTED = ParallelConfig(activation_checkpointing="full")
SCATTERED = ParallelConfig(activation_checkpointing="full", zero_stage=3)
SOME = ParallelConfig(activation_checkpointing="selective", checkpointed_every=2)


def kept_by(
    model: Any, arguments: tuple[Tensor, ...], bf16: bool, twice: frozenset[int], copies_last: bool = True
) -> tuple[int, int]:
    """Bytes kept for the backward pass beside weights and copies of them that last for a step, and the most alive in it
    beside weights and gradients. In the engine's context."""
    passes = torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=copies_last)
    outside = torch.autocast("cpu", torch.bfloat16, enabled=False, cache_enabled=copies_last)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def keep_input(module: Any, arguments: tuple[Any, ...]) -> None:
        keep(arguments[0])

    hooks = [model.blocks[i].register_forward_pre_hook(keep_input) for i in twice]
    with Tracer() as tracer, saved_tensors_hooks(keep, lambda tensor: tensor), passes:
        model(*arguments)
    lasting = tracer.copies if copies_last else {}
    storages = [tensor.untyped_storage() for tensor in kept.values()]
    size = sum(storage.nbytes() for storage in storages if storage._cdata not in lasting)
    storages.clear()
    for hook in hooks:
        hook.remove()
    kept.clear()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Tracer() as tracer, outside:
        with passes:
            nll, log_z = model(*arguments)
        tracer.peak = tracer.alive
        loss_of(nll, log_z).backward()
    return size, tracer.peak


def batch(time: int, first: int = 0) -> tuple[Tensor, ...]:
    tokens = torch.randint(0, 61, (ROWS, time), generator=torch.Generator().manual_seed(first))
    return tokens, torch.arange(first, first + time).expand(ROWS, -1), tokens


def planned(layers: tuple[str, ...], bf16: bool, parallel: ParallelConfig, world: int = 1) -> tuple[float, float]:
    with imagined_world(world):
        precision = "bf16" if bf16 else "fp32"
        planner = planner_of(
            layers=layers, parallel=parallel, time=TIME, rows=ROWS, batch_size=ROWS, precision=precision
        )
        found = planner.as_configured(world)
        kept, working, exchanged = found._activations(0)
        head, copies = found.blocks.cost("head", found.split), found._copies(0)
        return kept + exchanged + head.kept, kept + exchanged + copies + max(working, head.peak)


def compare(layers: tuple[str, ...], bf16: bool, parallel: ParallelConfig) -> None:
    model = LM(config_of(layers))
    checkpoint_blocks(model, parallel)
    found = kept_by(model, batch(TIME), bf16, checkpointed_blocks(layers, parallel), parallel.zero_stage < 3)
    wanted = planned(layers, bf16, parallel)
    assert wanted == pytest.approx(found, rel=0.15), (layers, bf16, parallel.activation_checkpointing)


@pytest.mark.parametrize("parallel", [ParallelConfig(), CHECKPOINTED, SCATTERED], ids=["none", "full", "zero3"])
def test_what_a_stack_of_every_mixer_keeps_and_holds(parallel: ParallelConfig) -> None:
    compare(MIXERS, True, parallel)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXERS)
def test_what_each_mixer_keeps_and_holds(kind: str) -> None:
    for bf16, parallel in ((True, ParallelConfig()), (True, CHECKPOINTED), (False, SOME)):
        compare((kind,) * DEPTH, bf16, parallel)


def on_ranks(grid: Grid, sequence: int, tensor: int, kinds: tuple[str, ...]) -> dict[str, int]:
    from parallel.partition import build_model

    found = {}
    on = grid.arranged(sequence=sequence, tensor=tensor)
    for kind in kinds:
        parallel = ParallelConfig(sequence=sequence, tensor=tensor)
        config = config_of((kind,) * DEPTH)
        model, _, _ = build_model(config, on, seed=0, sequence_length=TIME, parallel=parallel)
        slice_time = TIME // sequence
        arguments = batch(slice_time, on.axes["sequence"].index * slice_time)
        found[kind] = kept_by(model, arguments, True, frozenset())[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("sequence", "tensor"), [(2, 1), (1, 2)])
def test_what_ranks_keep(ranks: Any, sequence: int, tensor: int) -> None:
    last = ranks(2).run(on_ranks, sequence=sequence, tensor=tensor, kinds=MIXERS)[-1]
    for kind, found in last.items():
        wanted, _ = planned((kind,) * DEPTH, True, ParallelConfig(sequence=sequence, tensor=tensor), world=2)
        assert wanted == pytest.approx(found, rel=0.15), kind
