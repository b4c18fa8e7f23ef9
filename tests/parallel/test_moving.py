"""Checkpoints between arrangements of ranks: what one saves, another continues as the one goes on itself."""

import os
from pathlib import Path

import pytest
import torch

from models.checkpoint import read_meta, read_weights
from models.lm import LM
from parallel.grid import Grid
from tests.parallel.engines import (
    OPTIMIZER,
    Curve,
    Split,
    engine_of,
    global_batch,
    learning_rate,
    microbatches,
)
from tests.parallel.mixed import Z_LOSS, config_of
from tests.parallel.saving import save
from training.optimizer import parameter_groups

FAMILIES = {"layers": ("rglru", "hgrn2", "gated_deltanet", "paralstm", "local_attention")}
UNTIED = FAMILIES | {"tied": False}
AFTER = 5
"""Steps that are compared after each move."""

ONE = (1, Split(num_microbatches=4))
DATA = (2, Split(zero=2, num_microbatches=1))
ZERO_3 = (2, Split(zero=3))
TENSOR = (2, Split(tensor=2, num_microbatches=1))
SEQUENCE = (2, Split(sequence=2))
PIPELINE = (2, Split(pipeline=2))
PIPELINE_TENSOR = (4, Split(pipeline=2, tensor=2))
ALL_AXES = (8, Split(pipeline=2, sequence=2, tensor=2))
Arrangement = tuple[int, Split]


def course_alone(settings: dict, steps: int) -> Curve:
    """Loss, z-loss, gradient norm and targets of each step in one process, torch alone."""
    model = LM(config_of(**settings))
    adamw = torch.optim.AdamW(
        parameter_groups(model, OPTIMIZER.weight_decay), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    found = []
    for step in range(steps):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step % 8)
        batch = global_batch(step)
        tokens = int((batch.labels != -100).sum())
        nll, log_z = model(batch.input_ids, batch.positions, batch.labels)
        loss, z_loss = nll.sum() / tokens, log_z.square().sum() / tokens
        adamw.zero_grad()
        (loss + Z_LOSS * z_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        adamw.step()
        found.append((loss.item(), z_loss.item(), norm.item(), tokens))
    return found


def moves(grid: Grid, directory: Path, first: int, splits: list[Split], settings: dict) -> list[Curve]:
    """Each arrangement in turn goes on from the newest checkpoint, from step `first` on, saves one step later, and
    trains on for as many steps as the next one, which continues from there, is compared on."""
    from parallel.checkpoint import find_checkpoint, load_checkpoint

    courses = []
    for start, split in enumerate(splits, first):
        engine = engine_of(grid, split, config_of(**settings), seed=0 if start == 0 else 1)
        path, skipped = find_checkpoint(grid, directory)
        if start > 0:
            assert not skipped
            assert load_checkpoint(engine, path, verified=True)["step"] == start
        course = []
        for step in range(start, start + 1 + AFTER):
            result = engine.step(microbatches(engine, global_batch(step)), learning_rate(step % 8))
            course.append(tuple(result[:4]))
            if step == start:
                save(engine, directory, start + 1)
        courses.append(course)
    return courses


def assert_close(course: Curve, wanted: Curve) -> None:
    torch.testing.assert_close(torch.tensor(course), torch.tensor(wanted), rtol=1e-5, atol=0.0)


def assert_a_chain_keeps_the_curve(ranks, directory: Path, chain: list[Arrangement], settings: dict) -> None:
    start, uninterrupted = 0, course_alone(settings, AFTER)
    while start < len(chain):
        size = chain[start][0]
        length = next((n for n, (of_size, _) in enumerate(chain[start:]) if of_size != size), len(chain) - start)
        splits = [split for _, split in chain[start : start + length]]
        found = ranks(size).run(moves, directory=directory, first=start, splits=splits, settings=settings, timeout=600)
        for courses in zip(*found, strict=True):
            for course in courses:
                assert_close(course[:AFTER], uninterrupted)
            uninterrupted = courses[0][1:]
        start += length
    weights = read_weights(directory / "latest")
    assert {name: list(w.shape) for name, w in weights.items()} == read_meta(directory / "latest")["parameters"]
    assert os.readlink(directory / "latest") == f"step_{len(chain):08d}"


def test_a_chain_of_arrangements_of_two(ranks, tmp_path):
    """Each saves for another and continues another's: cut layers, cut tensors, cut depth, and one process."""
    assert_a_chain_keeps_the_curve(ranks, tmp_path, [ONE, TENSOR, ZERO_3, PIPELINE, ONE], FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        # Short: rounding grows along a course, and some twelve steps on gradient norms differ by 2e-5 without any move.
        [ONE, DATA, TENSOR, ZERO_3, PIPELINE, SEQUENCE, ONE],
        [SEQUENCE, PIPELINE_TENSOR, ZERO_3, PIPELINE_TENSOR, ONE, PIPELINE_TENSOR, PIPELINE],
        [DATA, SEQUENCE, PIPELINE_TENSOR, DATA, PIPELINE_TENSOR, TENSOR],
        [PIPELINE, ALL_AXES, ONE, ALL_AXES, ZERO_3, SEQUENCE],
        [PIPELINE_TENSOR, ALL_AXES, TENSOR, PIPELINE, DATA, ZERO_3, TENSOR],
    ],
    ids=["two ranks", "four ranks", "four and two ranks", "eight ranks", "between them"],
)
@pytest.mark.parametrize("settings", [FAMILIES, UNTIED], ids=["tied", "untied"])
def test_a_chain_of_every_arrangement(ranks, tmp_path, chain, settings):
    assert_a_chain_keeps_the_curve(ranks, tmp_path, chain, settings)
