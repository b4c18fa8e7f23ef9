"""Engines over any arrangement of ranks, and what one step of them finds: loss, norm and every parameter's gradient.

The gradients are those that reach the optimizer: after every reduction over data, sequence, tensor and pipeline ranks.
"""

from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.lm import LM
from parallel.collectives import all_gather
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.partition import build_model
from tests.parallel.mixed import TIME, Z_LOSS, batch, config_of, loss_of, noise
from tests.parallel.tiny import OPTIMIZER, Batch
from training.optimizer import parameter_groups

ROWS = 4


class Split(NamedTuple):
    """How ranks are arranged; what the product leaves works on different rows."""

    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1
    zero: int = 1
    num_microbatches: int = 2
    stages: tuple[int, ...] | None = None


def engine_of(grid: Grid, split: Split, config: ModelConfig, *, rows: int = ROWS, seed: int = 0, **changes: Any) -> Any:
    """`changes` replace the engine's settings, and under `parallel` those of the ranks."""
    from parallel.pipeline import make_engine

    grid = grid.arranged(pipeline=split.pipeline, sequence=split.sequence, tensor=split.tensor)
    parallel = ParallelConfig(
        pipeline=split.pipeline,
        sequence=split.sequence,
        tensor=split.tensor,
        zero_stage=split.zero,
        stages=split.stages,
        **changes.pop("parallel", {}),
    )
    model, _, partition = build_model(config, grid, seed=seed, sequence_length=TIME, parallel=parallel)
    settings: dict[str, Any] = {
        "optimizer": OPTIMIZER,
        "precision": "fp32",
        "z_loss": Z_LOSS,
        "micro_batch_size": rows // (grid.dp_size * split.num_microbatches),
        "num_microbatches": split.num_microbatches,
    }
    return make_engine(model, grid=grid, parallel=parallel, partition=partition, **settings | changes)


def microbatches(engine: Any, whole: Batch) -> list[Batch]:
    """This rank's rows of a step, in the loader's order."""
    size, index, count = engine.grid.dp_size, engine.grid.dp_rank, engine.num_microbatches
    rows = len(whole.labels) // (size * count)
    starts = [(m * size + index) * rows for m in range(count)]
    return [Batch(*(field[start : start + rows] for field in whole)) for start in starts]


def step_in_float64(grid: Grid, split: Split, settings: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    """Loss, norm and the gradients of the parameters that this rank's stage holds, of `config_of(**settings)`.

    ZeRO 0 keeps the parameters that it is given, so that they may be wider; the update, which is in fp32, is refused.
    """
    from deepspeed.accelerator import get_accelerator

    never = replace(OPTIMIZER, clip_norm=None)
    split = split._replace(zero=0)
    engine = engine_of(grid, split, config_of(**settings), rows=2, optimizer=never, **changes)
    partition = engine.state._partition
    engine.module.double()
    engine._deepspeed.communication_data_type = torch.float64
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            parameter += partition.part(name, noise(name, partition.shapes[name]))
    found: dict[str, Tensor] = {}

    def keep(loss: float, norm: float) -> bool:
        for name, parameter in engine.module.named_parameters():
            gradient = parameter.grad.clone()
            if name in partition.cuts:
                gradient = partition.whole(name, all_gather(gradient, partition.axis).unbind(0))
            found[name] = gradient
        return False

    input_ids, positions, labels = batch()
    whole = Batch(input_ids=input_ids, labels=labels, positions=positions)
    with mock.patch.object(get_accelerator(), "supported_dtypes", return_value=[torch.float64]):
        result = engine.step(microbatches(engine, whole), lr=0.0, accept=keep)
    assert not result.accepted
    measured = {"loss": result.loss, "norm": result.grad_norm}
    return found | {name: torch.tensor(value, dtype=torch.float64) for name, value in measured.items()}


def alone_in_float64(config: ModelConfig) -> dict[str, Tensor]:
    """The same in one process, torch alone."""
    model = LM(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += noise(name, parameter.shape)
    input_ids, positions, labels = batch()
    tokens = (labels != -100).sum()
    nll, log_z = model(input_ids, positions, labels)
    (loss_of(nll, log_z) * (1 / tokens)).backward()  # the engine's factor is a quotient in fp32
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([z.norm() for z in gradients.values()]).norm()
    return gradients | {"loss": nll.detach().sum() / tokens, "norm": norm}


STEPS = 5
NOISE = 0.02
"""Of `noise`: more of it leaves fp32 itself 1e-5 from float64, in gradients of single numbers that nearly cancel."""
Curve = list[tuple[float, float, float, int]]
"""Loss, z-loss, gradient norm and number of targets of each step."""


def learning_rate(step: int) -> float:
    """Low: AdamW's first updates are signs of gradients, and near zero the sign is that of the rounding."""
    return 3e-4 * (1.0 - 0.1 * step)


def global_batch(step: int) -> Batch:
    """Rows with other documents and numbers of targets each."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 61, (ROWS, TIME + 1), generator=generator)
    positions = torch.arange(TIME).repeat(ROWS, 1)
    for row, cut in enumerate((5, 12, 18)):
        positions[row, cut:] = torch.arange(TIME - cut)
    labels = tokens[:, 1:].clone()
    for row, targets in enumerate((20, 3, 24, 11)):
        labels[row, targets:] = -100
    return Batch(tokens[:, :-1], labels, positions)


def noisy_engine(grid: Grid, split: Split, settings: dict[str, Any], **changes: Any) -> Any:
    """Of `config_of(**settings)`."""
    engine = engine_of(grid, split, config_of(**settings), **changes)
    for name in engine.state.names:
        weight = engine.state.gather(name, "weight").clone()
        engine.state.assign(name, "weight", weight + NOISE * noise(name, weight.shape).float())
    return engine


def take(engine: Any, steps: range) -> Curve:
    return [
        tuple(engine.step(microbatches(engine, global_batch(step)), learning_rate(step))[:4])  # type: ignore[misc]
        for step in steps
    ]


def curve(grid: Grid, split: Split, settings: dict[str, Any], **changes: Any) -> tuple[Curve, dict[str, Tensor]]:
    """The first steps of a noisy engine, and the gradients of the first one, before they were clipped, of the
    parameters that this rank's stage holds."""
    engine = noisy_engine(grid, split, settings, **changes)
    first = take(engine, range(1))
    # The first moment is a share of the gradient, clipped.
    share = (1 - OPTIMIZER.betas[0]) * min(1.0, OPTIMIZER.clip_norm / (first[0][2] + 1e-6))
    gradients = {name: engine.state.gather(name, "exp_avg") / share for name in engine.state.names}
    return first + take(engine, range(1, STEPS)), gradients


def curve_alone(config: ModelConfig) -> tuple[Curve, dict[str, Tensor]]:
    """The same in one process, torch alone."""
    model = LM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += NOISE * noise(name, parameter.shape).to(parameter.dtype)
    adamw = torch.optim.AdamW(
        parameter_groups(model, OPTIMIZER.weight_decay), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    found, gradients = [], {}
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step)
        batch = global_batch(step)
        tokens = int((batch.labels != -100).sum())
        nll, log_z = model(batch.input_ids, batch.positions, batch.labels)
        loss, z_loss = nll.sum() / tokens, log_z.square().sum() / tokens
        adamw.zero_grad()
        (loss + Z_LOSS * z_loss).backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        adamw.step()
        found.append((loss.item(), z_loss.item(), norm.item(), tokens))
    assert all(norm > OPTIMIZER.clip_norm for _, _, norm, _ in found), "clipping is at work"
    return found, gradients


def worst(of_ranks: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest relative RMS over ranks of each tensor, each rank having what its stage holds; infinite where none
    has it, or it is not a number."""
    assert set().union(*of_ranks) <= expected.keys()
    found = {}
    for name, z in expected.items():
        errors = [float((of_rank[name] - z).norm() / z.norm()) for of_rank in of_ranks if name in of_rank]
        found[name] = max((error if error == error else torch.inf for error in errors), default=torch.inf)
    return found
