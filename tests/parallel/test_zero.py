"""Every stage of ZeRO beside the other axes: the curve of one process, the same start, checkpoints from and to all."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from models.init import initial_values
from models.lm import LM
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.partition import build_model
from parallel.tensor import copy_marks
from tests.parallel.mixed import TIME, Z_LOSS, config_of
from tests.parallel.test_topologies import (  # noqa: F401
    LAYERS,
    ROWS,
    STEPS,
    assert_same_curve,
    global_batch,
    reference,
    train,
)
from tests.parallel.tiny import OPTIMIZER

Case = tuple[int, int, int, tuple[str, ...]]
"""ZeRO stage, sequence ranks, tensor ranks, and what of `weights` and `moments` is kept off the device."""

EVERYTHING = {"stage3_param_persistence_threshold": 0}
"""Small parameters are scattered, too, which by default stay whole."""
KEYS = {"weights": "offload_param", "moments": "offload_optimizer"}


def engine_of(grid: Grid, case: Case, seed: int = 0, **changes: Any) -> Any:
    from parallel.engine import Engine

    stage, sequence, tensor, kept = case
    grid = grid.arranged(sequence=sequence, tensor=tensor)
    zero = (EVERYTHING if stage == 3 else {}) | {KEYS[what]: {"device": "cpu"} for what in kept}
    parallel = ParallelConfig(
        zero_stage=stage, sequence=sequence, tensor=tensor, engine={"zero_optimization": zero} if zero else {}
    )
    model, _, partition = build_model(config_of(LAYERS), grid, seed=seed, sequence_length=TIME, parallel=parallel)
    settings: dict[str, Any] = {"precision": "fp32", "optimizer": OPTIMIZER, "z_loss": Z_LOSS, "num_microbatches": 1}
    settings |= {"micro_batch_size": ROWS // grid.dp_size} | changes
    return Engine(model, grid=grid, parallel=parallel, partition=partition, **settings)


def curves(grid: Grid, cases: list[Case], steps: range = STEPS, **changes: Any) -> list[list[tuple]]:
    return [train(engine_of(grid, case, **changes), steps) for case in cases]


# Those of test_topologies.py and test_engine.py complete the table: every stage on two data, sequence and tensor ranks,
# and on two of the first beside two of the last.
CASES: list[tuple[int, list[Case]]] = [
    (2, [(0, 2, 1, ()), (3, 1, 1, ()), (3, 2, 1, ()), (3, 1, 2, ()), (2, 1, 2, ("moments",))]),
    (4, [(3, 1, 2, ())]),
]
MORE: list[tuple[int, list[Case]]] = [
    (2, [(1, 1, 2, ("moments",)), (2, 2, 1, ("moments",)), (3, 1, 2, ("moments", "weights"))]),
    (4, [(0, 1, 2, ()), (2, 1, 2, ()), (3, 2, 2, ())]),
]


@pytest.mark.parametrize(("size", "cases"), [*CASES, *(pytest.param(*group, marks=pytest.mark.slow) for group in MORE)])
def test_the_curve_of_one_process(
    ranks: Any,
    reference: list[tuple],  # noqa: F811
    size: int,
    cases: list[Case],
) -> None:
    for of_rank in ranks(size).run(curves, cases=cases):
        for found in of_rank:
            assert_same_curve(found, reference)


@pytest.mark.slow
def test_a_run_repeats_to_the_bit(ranks: Any) -> None:
    case: Case = (3, 1, 2, ("moments",))
    for first, second in ranks(2).run(curves, cases=[case, case], steps=range(3)):
        assert first == second


def test_bf16_products_are_the_same_under_every_stage(ranks: Any) -> None:
    """DeepSpeed's own bf16 takes another optimizer without ZeRO; autocast over fp32 parameters takes the same."""
    cases: list[Case] = [(stage, 1, 1, ()) for stage in (0, 1, 2, 3)]
    first, *others = ranks(2).run(curves, cases=cases, precision="bf16", steps=range(2))[0]
    for other in others:
        assert_same_curve(other, first)


def with_unmarked_parts(grid: Grid, case: Case) -> list[tuple]:
    """Of parts of a tensor axis that are scattered, DeepSpeed is not told that each rank's counts."""

    def keep_one(source: nn.Parameter, target: nn.Parameter) -> None:
        copy_marks(source, target)
        target.tensor_model_parallel = False  # type: ignore[attr-defined]

    with mock.patch("parallel.partition.copy_marks", keep_one):
        return train(engine_of(grid, case), range(1))


def test_a_part_that_is_not_marked_shows(ranks: Any, reference: list[tuple]) -> None:  # noqa: F811
    """The gradients of the other tensor ranks are missing in the norm."""
    ((loss, _, norm, _),) = ranks(2).run(with_unmarked_parts, case=(3, 1, 2, ()))[0]
    assert loss == pytest.approx(reference[0][0], rel=1e-5)
    assert norm < 0.99 * reference[0][2]


def starts(grid: Grid, cases: list[Case]) -> tuple[list[dict[str, torch.Tensor]], list[tuple[int, int, int]]]:
    """Weights before any step, and of the parameters that exist while a model is built: most at once, in all of a
    rank's shares, in the largest."""
    from parallel.scatter import Scatter

    found, sizes = [], []
    scatter = Scatter.__call__
    for case in cases:
        alive: list[int] = []
        largest: list[int] = []

        def noted(self: Scatter, parameter: nn.Parameter, alive: Any = alive, largest: Any = largest) -> None:
            largest.append(parameter.numel())
            scatter(self, parameter)
            assert parameter.numel() == 0
            alive.append(parameter.ds_tensor.numel())  # type: ignore[attr-defined]

        with mock.patch.object(Scatter, "__call__", noted):
            engine = engine_of(grid, case)
        state = engine.state
        found.append({name: state.gather(name, "weight").clone() for name in state.names})
        sizes.append((sum(state.shapes[name].numel() for name in state.names), sum(alive), max(largest)))
    return found, sizes


def test_weights_start_as_in_one_process_and_never_stand_whole_on_a_rank(ranks: Any) -> None:
    expected = dict(initial_values(LM(config_of(LAYERS)), 0))
    cases: list[Case] = [(3, 1, 1, ()), (3, 1, 2, ())]
    for found, sizes in ranks(2).run(starts, cases=cases):
        for weights in found:
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], value) for name, value in expected.items())
        total, share, largest = sizes[0]
        assert total / 2 <= share < 0.51 * total, "two ranks share all; what does not divide is filled up"
        assert largest < 0.1 * total


def save(grid: Grid, directory: Path, cases: list[Case]) -> None:
    from tests.parallel.test_checkpoint import save as save_as

    for case in cases:
        engine = engine_of(grid, case)
        train(engine, range(2))
        save_as(engine, directory / str(case), step=2)


def resume(grid: Grid, directory: Path, pairs: list[tuple[Case, Case]]) -> list[list[tuple]]:
    from parallel.checkpoint import find_checkpoint, load_checkpoint

    results = []
    for saved, loads in pairs:
        engine = engine_of(grid, loads, seed=1)
        path, _ = find_checkpoint(grid, directory / str(saved))
        load_checkpoint(engine, path)
        assert engine.state.num_updates == 2
        results.append(train(engine, range(2, 5)))
    return results


@pytest.mark.slow
def test_checkpoints_move_between_stages(ranks: Any, reference: list[tuple], tmp_path: Path) -> None:  # noqa: F811
    scattered: Case = (3, 1, 1, ())
    off: Case = (2, 1, 2, ("moments",))
    all_off: Case = (3, 1, 2, ("moments", "weights"))
    ranks(2).run(save, directory=tmp_path, cases=[scattered, off, all_off])
    pairs: list[tuple[Case, Case]] = [(scattered, off), (off, all_off), (all_off, scattered)]
    found = ranks(2).run(resume, directory=tmp_path, pairs=pairs)
    found += ranks(1).run(resume, directory=tmp_path, pairs=[(scattered, (0, 1, 1, ()))])
    for of_rank in found:
        for continued in of_rank:
            assert_same_curve(continued, reference[2:])
