"""What the planner says DeepSpeed holds, against every tensor that real engines hold: equal to the byte."""

import gc
from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.grid import Grid
from tests.parallel.engines import Split, engine_of, global_batch, microbatches, noisy_engine
from tests.parallel.mixed import TIME, config_of
from training.optimizer import parameter_groups

Case = tuple[Split, dict[str, Any]]
"""How ranks are arranged, and keys of `zero_optimization`."""
BUCKET = 30_000
GATHERED = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": BUCKET}


def storages() -> dict[int, int]:
    """Bytes of all storages that are alive, by address."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def measured(grid: Grid, cases: list[Case]) -> list[dict[str, int]]:
    """Bytes of the weights, of what the optimizer updates, and of what is there besides when it is called."""
    found = []
    for split, zero in cases:
        settings = {"engine": {"zero_optimization": zero}} if zero else {}
        engine = engine_of(grid, split, config_of(), parallel=settings)
        sizes: dict[str, int] = {}
        updated = list(engine.state._holding.updated)  # while one group is updated, DeepSpeed hides the others

        def look(loss: float, norm: float, engine: Any = engine, sizes: Any = sizes, updated: Any = updated) -> bool:
            alive, state = storages(), engine.state._adamw.state
            moments = [z for tensor in updated for z in state[tensor].values()]
            zero_optimizer = engine._deepspeed.optimizer
            shares = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
            own = {z.untyped_storage().data_ptr() for z in (*shares, *engine.module.parameters()) if z.numel()}
            master = [] if engine.parallel.zero_stage == 0 else updated
            of_optimizer = {z.untyped_storage().data_ptr() for z in (*master, *moments)} - own
            grads = {p.grad.untyped_storage().data_ptr() for p in engine.module.parameters() if p.grad is not None}
            if engine.parallel.zero_stage in (1, 2):
                parts = [z for part in zero_optimizer.averaged_gradients.values() for z in part or ()]
                flat = [tensor.grad for tensor in updated if tensor.grad is not None]
                grads |= {z.untyped_storage().data_ptr() for z in (*parts, *flat)}
            if engine.parallel.zero_stage == 3:
                flat = [tensor.grad for tensor in updated if tensor.grad is not None]
                grads |= {z.untyped_storage().data_ptr() for z in flat}
                grads.add(zero_optimizer.grad_partitions_flat_buffer.untyped_storage().data_ptr())
            grads -= own | of_optimizer
            sizes.update(
                optimizer=sum(alive[at] for at in of_optimizer),
                at_step=sum(alive[at] for at in grads),
            )
            return True

        engine.step(microbatches(engine, global_batch(0)), 1e-3)
        held = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
        places = {z.untyped_storage().data_ptr() for z in (*held, *engine.module.parameters()) if z.numel()}
        alive = storages()
        sizes["weights"] = sum(alive[at] for at in places)  # between steps, when ZeRO 3 has small ones whole again
        engine.step(microbatches(engine, global_batch(1)), 1e-3, accept=look)
        found.append(sizes)
        del engine
    return found


def planned(rank: int, size: int, case: Case) -> dict[str, int]:
    from parallel.axes import axis_sizes, make_axes
    from parallel.plan.blocks import Blocks
    from parallel.plan.world import imagined_world
    from parallel.stages import stages_of

    split, zero = case
    axes = make_axes(rank, axis_sizes(size, pipeline=split.pipeline, sequence=split.sequence, tensor=split.tensor))
    with imagined_world(size):
        blocks = Blocks(config_of(), TIME, bf16=False, sharded_norms=False, device_type="cpu")
        stages = stages_of(blocks.whole, TIME, split.pipeline)
        found = blocks.state(
            stages.names[axes["pipeline"].index],
            split.tensor,
            zero=split.zero,
            ranks=axes["replicas"].size,
            index=axes["replicas"].index,
            bucket=zero.get("reduce_bucket_size", 50_000_000),
            persistent=zero.get("stage3_param_persistence_threshold", 100_000),
        )
    return {key: getattr(found, key) for key in ("weights", "optimizer", "at_step")}


ZERO_3 = {"reduce_bucket_size": BUCKET}
TWO: list[Case] = [
    (Split(tensor=2, zero=0), {}),
    (Split(zero=2), {}),
    (Split(zero=3), GATHERED),
    (Split(pipeline=2, zero=1), {}),
]
MORE: list[Case] = [
    (Split(zero=1), {}),
    (Split(zero=0), {}),
    (Split(zero=3), ZERO_3),
    (Split(tensor=2, zero=1), {}),
    (Split(sequence=2, zero=2), {}),
    (Split(pipeline=2, zero=0), {}),
]
FOUR: list[Case] = [
    (Split(tensor=2, zero=2), {}),
    (Split(tensor=2, zero=3), GATHERED),
    (Split(tensor=2, zero=3), ZERO_3),
    (Split(pipeline=2, tensor=2, zero=0), {}),
    (Split(pipeline=2, tensor=2, zero=1), {}),
    (Split(pipeline=2, zero=1), {}),
    (Split(sequence=2, tensor=2, zero=3), GATHERED),
]


@pytest.mark.parametrize(
    ("size", "cases"),
    [(2, TWO), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((2, MORE), (4, FOUR)))],
)
def test_weights_optimizer_and_gradients_are_deepspeeds(ranks: Any, size: int, cases: list[Case]) -> None:
    for rank, of_rank in enumerate(ranks(size).run(measured, cases=cases, timeout=600.0)):
        for case, found in zip(cases, of_rank, strict=True):
            wanted = planned(rank, size, case)
            assert {key: found[key] for key in wanted} == wanted, (rank, case)


def updates(grid: Grid, split: Split, wanted: list[list[tuple[int, int, int | None]]]) -> list[bool]:
    """Of each of AdamW's groups, whether this rank updates what `build_rank` says."""
    engine = noisy_engine(grid, split, {})  # so that no two parts are alike
    optimizer, found = engine._deepspeed.optimizer, []
    groups = [group["params"] for group in parameter_groups(engine.module, 0.0)]
    assert engine.grid.axes["replicas"].size > 1, "otherwise there is nothing to divide"
    for number, (parameters, (total, share, first)) in enumerate(zip(groups, wanted[grid.rank], strict=True)):
        if first is None:
            parts = [p.ds_tensor.numel() for p in parameters]
            found.append(sum(parts) == share and sum(p.ds_numel for p in parameters) == total)
            continue
        flat, part = (
            torch.cat([p.detach().flatten() for p in parameters]),
            (optimizer.single_partition_of_fp32_groups[number].detach()),
        )
        within = max(0, min(share, total - first))
        same = torch.equal(part[:within], flat[first : first + within])
        found.append(same and len(flat) == total and len(part) == share)
    return found


@pytest.mark.parametrize(
    ("size", "split"),
    [
        (2, Split(zero=1)),
        (2, Split(zero=3)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, Split(sequence=2, zero=2)),
                (4, Split(2)),
                (4, Split(tensor=2)),
                (4, Split(zero=2, num_microbatches=1)),
            )
        ),
    ],
    ids=str,
)
def test_each_rank_updates_the_part_that_it_is_said_to(ranks: Any, size: int, split: Split) -> None:
    from parallel.plan.rank import build_rank
    from parallel.plan.world import imagined_world
    from tests.parallel.plans import planner_of

    names = {"pipeline": split.pipeline, "sequence": split.sequence, "tensor": split.tensor}
    with imagined_world(size):
        planner = planner_of(parallel=ParallelConfig(zero_stage=split.zero, **names))
        wanted = [list(build_rank(planner, size, rank).groups) for rank in range(size)]
    assert len({str(of_rank) for of_rank in wanted}) > 1 or split.zero == 3
    assert all(all(found) for found in ranks(size).run(updates, split=split, wanted=wanted))


def test_a_config_with_its_own_thresholds_is_read() -> None:
    """What `Estimate.state` passes on is what the engine is given."""
    from parallel.plan.world import imagined_world
    from tests.parallel.plans import planner_of

    parallel = ParallelConfig(
        zero_stage=3, engine={"zero_optimization": {"reduce_bucket_size": 7, "stage3_param_persistence_threshold": 0}}
    )
    with imagined_world(4):
        state = planner_of(parallel=parallel).as_configured(4).state(0)
    assert state.buffers - 4 * 7 == 4 * state.entries, "all weights of so small a model are gathered at once"
    assert state.weights == 4 * state.share
