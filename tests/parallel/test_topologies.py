"""Engines over data, sequence and tensor ranks: the curve of one process, and checkpoints that all continue."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.lm import LM
from parallel.config import ParallelConfig
from parallel.grid import Grid
from tests.parallel.engines import ROWS, global_batch
from tests.parallel.mixed import TIME, Z_LOSS, config_of
from tests.parallel.tiny import LR, OPTIMIZER, Batch
from training.optimizer import parameter_groups

STEPS = range(5)
LAYERS = ("rglru", "hgrn2", "gated_deltanet", "paralstm", "local_attention")
Split = tuple[int, int, int]
"""ZeRO stage, sequence ranks, tensor ranks; what is left of the ranks works on different rows."""


def learning_rate(step: int) -> float:
    """Low: AdamW's first updates are signs of gradients, and near zero the sign is that of the rounding."""
    return 0.1 * LR * (1.0 - 0.1 * step)


def engine_on(grid: Grid, split: Split, seed: int = 0) -> Any:
    from parallel.engine import Engine
    from parallel.partition import build_model

    stage, sequence, tensor = split
    grid = grid.arranged(sequence=sequence, tensor=tensor)
    model, _, partition = build_model(config_of(LAYERS), grid, seed=seed, sequence_length=TIME)
    return Engine(
        model,
        grid=grid,
        parallel=ParallelConfig(zero_stage=stage, sequence=sequence, tensor=tensor),
        optimizer=OPTIMIZER,
        precision="fp32",
        z_loss=Z_LOSS,
        micro_batch_size=ROWS // grid.dp_size,
        num_microbatches=1,
        partition=partition,
    )


def train(engine: Any, steps: range) -> list[tuple[float, float, float, int]]:
    results = []
    for step in steps:
        rows = ROWS // engine.grid.dp_size
        here = slice(engine.grid.dp_rank * rows, (engine.grid.dp_rank + 1) * rows)
        batch = Batch(*(field[here] for field in global_batch(step)))
        results.append(tuple(engine.step([batch], learning_rate(step))[:4]))
    return results


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float, float, int]]:
    """One process, torch alone."""
    model = LM(config_of(LAYERS))
    adamw = torch.optim.AdamW(
        parameter_groups(model, OPTIMIZER.weight_decay), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    results = []
    for step in STEPS:
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step)
        batch = global_batch(step)
        tokens = int((batch.labels != -100).sum())
        nll, log_z = model(batch.input_ids, batch.positions, batch.labels)
        loss, z_loss = nll.sum() / tokens, log_z.square().sum() / tokens
        adamw.zero_grad()
        (loss + Z_LOSS * z_loss).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        adamw.step()
        results.append((loss.item(), z_loss.item(), norm.item(), tokens))
    return results


def curves(grid: Grid, splits: list[Split]) -> list[list[tuple]]:
    return [train(engine_on(grid, split), STEPS) for split in splits]


def assert_same_curve(found: list[tuple], expected: list[tuple]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0.0)


TWO: list[Split] = [(1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (0, 1, 2)]
FOUR: list[Split] = [(1, 1, 2), (1, 2, 1), (2, 2, 2)]


@pytest.mark.parametrize(("size", "splits"), [(2, TWO), (4, FOUR)])
def test_the_curve_of_one_process(ranks: Any, reference: list[tuple], size: int, splits: list[Split]) -> None:
    assert all(norm > OPTIMIZER.clip_norm for _, _, norm, _ in reference), "clipping is at work"
    for of_rank in ranks(size).run(curves, splits=splits):
        assert len(of_rank) == len(splits)
        for found in of_rank:
            assert_same_curve(found, reference)


def save(grid: Grid, directory: Path, splits: list[Split]) -> None:
    from tests.parallel.test_checkpoint import save as save_as

    for split in splits:
        engine = engine_on(grid, split)
        train(engine, range(2))
        save_as(engine, directory / str(split), step=2)


def resume(grid: Grid, directory: Path, pairs: list[tuple[Split, Split]]) -> list[list[tuple]]:
    from parallel.checkpoint import find_checkpoint, load_checkpoint

    results = []
    for saved, loads in pairs:
        engine = engine_on(grid, loads, seed=1)
        path, _ = find_checkpoint(grid, directory / str(saved))
        load_checkpoint(engine, path)
        results.append(train(engine, range(2, 5)))
    return results


@pytest.mark.slow
def test_checkpoints_move_between_topologies(ranks: Any, reference: list[tuple], tmp_path: Path) -> None:
    slices, heads = (1, 2, 1), (2, 1, 2)
    ranks(2).run(save, directory=tmp_path, splits=[slices, heads])
    found = ranks(2).run(resume, directory=tmp_path, pairs=[(slices, heads), (heads, slices)])
    found += ranks(1).run(resume, directory=tmp_path, pairs=[(heads, (0, 1, 1)), (slices, (1, 1, 1))])
    found += ranks(4).run(resume, directory=tmp_path, pairs=[(heads, (1, 2, 2))])
    for of_rank in found:
        for continued in of_rank:
            assert_same_curve(continued, reference[2:])
