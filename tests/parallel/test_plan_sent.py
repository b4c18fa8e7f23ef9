"""What the planner says a whole step sends, against every call of real engines: ours, and DeepSpeed's own."""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.plan.gathered import gathered
from parallel.plan.world import imagined_world
from parallel.traffic import Volume, counted
from tests.parallel.engines import ROWS, Split, engine_of, global_batch, microbatches
from tests.parallel.mixed import config_of
from tests.parallel.plans import planner_of

LAYERS = ("rglru", "hgrn2", "local_attention", "attention")
Case = tuple[Split, dict[str, Any]]
"""How ranks are arranged, and keys of `zero_optimization`."""
Sent = dict[tuple[str, str], Volume]
OPERATIONS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}
FLAGS = 16
"""Bytes of a sum that only asks or tells: norms, whether anything overflowed."""


def sent(grid: Grid, cases: list[Case]) -> list[Sent]:
    """By axis and operation, in the second step: in the first DeepSpeed learns in which order weights are used."""
    return [sent_by(engine_of(grid, s, config_of(LAYERS), parallel=settings(zero))) for s, zero in cases]


def settings(zero: dict[str, Any]) -> dict[str, Any]:
    return {"engine": {"zero_optimization": zero}} if zero else {}


def sent_by(engine: Any) -> Sent:
    from deepspeed.comm.torch import TorchBackend

    axes = {
        tuple(engine.grid.axes[axis].ranks): name for axis, name in (("pipeline", "pipeline"), ("replicas", "data"))
    }
    found: Sent = {}

    def add(axis: str, operation: str, volume: Volume) -> None:
        found[axis, operation] = found.get((axis, operation), Volume(0, 0)).plus(volume)

    def spy(name: str) -> Any:
        plain = getattr(TorchBackend, name)

        def call(self: Any, *arguments: Any, **others: Any) -> Any:
            everything = (*arguments, *others.values())
            handed = [z for z in everything if isinstance(z, torch.Tensor)][-1]
            size = handed.numel() * handed.element_size()
            group = next((z for z in everything if isinstance(z, dist.ProcessGroup)), None)
            if dist.get_world_size(group) > 1 and (size > FLAGS or name != "all_reduce"):
                add(axes[tuple(dist.get_process_group_ranks(group))], OPERATIONS[name], Volume(1, size))
            return plain(self, *arguments, **others)

        return mock.patch.object(TorchBackend, name, call)

    engine.step(microbatches(engine, global_batch(0)), 1e-3)
    with ExitStack() as watched:
        for name in OPERATIONS:
            watched.enter_context(spy(name))
        traffic = watched.enter_context(counted(engine.called))
        engine.step(microbatches(engine, global_batch(1)), 1e-3)
    for key, volume in traffic.volumes.items():
        if volume.bytes > FLAGS * volume.calls:
            add(key.axis, key.operation, volume)
    return found


def planned(rank: int, size: int, case: Case) -> Sent:
    split, zero = case
    names = {"pipeline": split.pipeline, "sequence": split.sequence, "tensor": split.tensor}
    parallel = ParallelConfig(zero_stage=split.zero, **names, **settings(zero))
    taken = split.pipeline * split.sequence * split.tensor
    with imagined_world(size):
        rows = ROWS * taken // size // split.num_microbatches
        found = planner_of(layers=LAYERS, parallel=parallel, rows=rows, batch_size=ROWS).as_configured(size)
        stage = rank // (size // split.pipeline)
        return found.step_volumes(stage, rank // split.tensor % split.sequence)


NONE_WHOLE = {"stage3_param_persistence_threshold": 0}
TWICE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
"""What was gathered ahead for the forward pass stays to the backward pass, too."""
SMALL_BUCKETS = {"reduce_bucket_size": 20_000}
TWO: list[Case] = [
    (Split(zero=0), {}),
    (Split(zero=1), {}),
    (Split(zero=1), SMALL_BUCKETS),
    (Split(zero=2), {}),
    (Split(zero=3), {}),
    (Split(zero=3), NONE_WHOLE),
    (Split(zero=3), NONE_WHOLE | TWICE),
    (Split(pipeline=2), {}),
    (Split(sequence=2), {}),
    (Split(tensor=2), {}),
]
FOUR: list[Case] = [
    (Split(pipeline=2, tensor=2), {}),
    (Split(sequence=2, tensor=2, zero=2), {}),
    (Split(pipeline=2), {}),
]


def test_weights_are_gathered_again_when_their_next_use_is_far() -> None:
    """A stack whose first weights its last part uses again."""
    units = [{"tied": 5}, {"a": 4}, {"b": 4}, {"tied": 5}]
    assert gathered(units, 0) == {"tied": 4, "a": 2, "b": 2}
    assert gathered(units, 1) == {"tied": 3, "a": 2, "b": 2}, "from the end of one pass to the start of the other"
    assert gathered(units, 9) == {"tied": 1, "a": 2, "b": 2}
    assert gathered(units, 11) == {"tied": 1, "a": 2, "b": 1}
    assert gathered(units, 19) == {"tied": 1, "a": 1, "b": 1}


@pytest.mark.parametrize(("size", "cases"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_a_step_sends_what_the_plan_says(ranks: Any, size: int, cases: list[Case]) -> None:
    for rank, of_rank in enumerate(ranks(size).run(sent, cases=cases)):
        for case, found in zip(cases, of_rank, strict=True):
            wanted = planned(rank, size, case)
            assert {place: v.bytes for place, v in found.items()} == {place: v.bytes for place, v in wanted.items()}, (
                rank,
                case,
            )
            for place, volume in wanted.items():
                if place[0] != "data":  # how DeepSpeed fills its buckets is its own affair
                    assert found[place].calls == volume.calls, (rank, case, place)
                else:
                    assert found[place].calls >= volume.calls, (rank, case, place)
