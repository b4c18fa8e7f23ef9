"""Matrix products in bf16, over slices and over heads: the curve of one process in fp32.

The delta rule's keys are 32 wide: over 4 features a normalised key can be close to zero before it is normalised, where
its gradient, and with it the norm, is anybody's (up to 0.2 from fp32 in one process; 3e-3 at 32).
"""

from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.grid import Grid
from tests.parallel.mixed import EVERY_MIXER, TIME, Z_LOSS, config_of
from tests.parallel.test_topologies import ROWS, STEPS, train
from tests.parallel.tiny import OPTIMIZER
from training.config import Precision

TOLERANCE = 1e-2
Curve = list[tuple[float, float, float, int]]


def curve(grid: Grid, sequence: int, tensor: int, precision: Precision) -> Curve:
    from parallel.engine import Engine
    from parallel.partition import build_model

    grid = grid.arranged(sequence=sequence, tensor=tensor)
    config = config_of(EVERY_MIXER, changes={"gated_deltanet": {"head_dim": 32}})
    model, _, partition = build_model(config, grid, seed=0, sequence_length=TIME)
    engine = Engine(
        model,
        grid=grid,
        parallel=ParallelConfig(sequence=sequence, tensor=tensor),
        optimizer=OPTIMIZER,
        precision=precision,
        z_loss=Z_LOSS,
        micro_batch_size=ROWS // grid.dp_size,
        num_microbatches=1,
        partition=partition,
    )
    return train(engine, STEPS)


@pytest.fixture(scope="module")
def expected(ranks: Any) -> Curve:
    return ranks(1).run(curve, sequence=1, tensor=1, precision="fp32")[0]


@pytest.mark.parametrize(("sequence", "tensor"), [(2, 1), (1, 2)])
def test_the_curve_of_one_process(ranks: Any, expected: Curve, sequence: int, tensor: int) -> None:
    first, second = ranks(2).run(curve, sequence=sequence, tensor=tensor, precision="bf16")
    assert first == second
    assert ranks(2).run(curve, sequence=sequence, tensor=tensor, precision="bf16")[0] == first, "to the bit, once more"
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected), rtol=TOLERANCE, atol=0.0)
