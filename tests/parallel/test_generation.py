"""Samples in the loop: from every arrangement of ranks the tokens of one process, and training goes on as without."""

from typing import Any

import pytest
import torch

from eval.generate import generate
from eval.sampling import Sampling
from models.lm import LM
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.partition import build_model
from tests.parallel.mixed import EVERY_MIXER, TIME, Z_LOSS, config_of
from tests.parallel.test_topologies import ROWS, train
from tests.parallel.tiny import OPTIMIZER

PROMPTS = [[1, 5, 9, 2, 44, 13, 8], [3], [60, 7, 21]]
SAMPLING = Sampling(max_tokens=6, temperature=1.0, top_p=0.9, seed=3)


def sampled(
    grid: Grid, layers: tuple[str, ...], cases: list[dict[str, Any]]
) -> list[tuple[list[list[int]], list[tuple], list[tuple]]]:
    """Continuations before training, and the curves of an engine that generates between its steps and one that does
    not."""
    from parallel.engine import Engine
    from parallel.generation import generating

    found = []
    for case in cases:
        parallel = ParallelConfig(**case)
        on = grid.arranged(sequence=parallel.sequence, tensor=parallel.tensor)
        engines = []
        for _ in range(2):
            model, _, partition = build_model(config_of(layers), on, seed=0, sequence_length=TIME, parallel=parallel)
            engines.append(
                Engine(
                    model,
                    grid=on,
                    parallel=parallel,
                    optimizer=OPTIMIZER,
                    precision="fp32",
                    z_loss=Z_LOSS,
                    micro_batch_size=ROWS // on.dp_size,
                    num_microbatches=1,
                    partition=partition,
                )
            )
        one, other = engines
        curve = train(one, range(1))
        with generating(other.module, on) as model:
            tokens = generate(model, PROMPTS, SAMPLING)
        again = train(other, range(1))
        with generating(other.module, on) as model:
            generate(model, PROMPTS, SAMPLING)
        found.append((tokens, curve + train(one, range(1, 2)), again + train(other, range(1, 2))))
    return found


SCATTERED = {"zero_stage": 3, "engine": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
CASES: dict[int, list[dict[str, Any]]] = {
    2: [{"tensor": 2}, {"sequence": 2}, SCATTERED, {"tensor": 2, "sequence_sharded_norms": True}],
    4: [{"tensor": 2, "sequence": 2} | SCATTERED],
}


SOME = ("gated_deltanet", "attention", "rglru")


@pytest.mark.parametrize(
    ("size", "layers"),
    [
        (2, SOME),
        pytest.param(2, EVERY_MIXER, marks=pytest.mark.slow),
        pytest.param(4, EVERY_MIXER, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_continue_as_one_process(ranks: Any, size: int, layers: tuple[str, ...]) -> None:
    with torch.no_grad():
        expected = generate(LM(config_of(layers)), PROMPTS, SAMPLING)
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    for of_rank in ranks(size).run(sampled, layers=layers, cases=CASES[size]):
        for case, (tokens, alone, interrupted) in zip(CASES[size], of_rank, strict=True):
            assert tokens == expected, case
            assert interrupted == alone, case
