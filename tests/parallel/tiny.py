"""A small hybrid model, batches with unequal token counts, and an engine over them, for tests on several ranks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.config import ModelConfig
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import LocalAttentionConfig
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig
from parallel.config import ParallelConfig
from parallel.grid import Grid
from training.config import OptimizerConfig

VOCAB_SIZE = 61
SEQUENCE_LENGTH = 12
GLOBAL_BATCH = 4
Z_LOSS = 1e-3
LR = 1e-2
OPTIMIZER = OptimizerConfig(lr=LR, weight_decay=0.1, clip_norm=0.5)


class Batch(NamedTuple):
    input_ids: Tensor
    labels: Tensor
    positions: Tensor


LAYERS = ("rglru", "rglru", "local_attention")


def tiny_model(seed: int = 0, width: int = 16, layers: tuple[str, ...] = LAYERS) -> LM:
    """Recurrent and windowed-attention blocks under a tied head."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        width=width,
        layers=layers,
        mixers=MixerConfigs(
            rglru=RGLRUConfig(width=width, gate_blocks=2),
            local_attention=LocalAttentionConfig(heads=2, kv_heads=1, head_dim=8, window=5),
        ),
        mlp=MLPConfig(width=2 * width),
    )
    return LM(config, seed=seed)


def global_batch(step: int) -> Batch:
    """The rows of one step: two documents a row, and between 1 and 10 targets a row."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB_SIZE, (GLOBAL_BATCH, SEQUENCE_LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row, targets in enumerate((10, 1, 7, 4)):
        labels[row, targets:] = -100
    boundary = 5
    positions = torch.cat([torch.arange(boundary), torch.arange(SEQUENCE_LENGTH - boundary)])
    return Batch(tokens[:, :-1], labels, positions.expand(GLOBAL_BATCH, -1))


def microbatches(grid: Grid, step: int, num_microbatches: int) -> list[Batch]:
    """This rank's share of `global_batch(step)`, in the loader's order."""
    batch = global_batch(step)
    rows = GLOBAL_BATCH // (grid.dp_size * num_microbatches)
    starts = [(m * grid.dp_size + grid.dp_rank) * rows for m in range(num_microbatches)]
    return [Batch(*(field[start : start + rows] for field in batch)) for start in starts]


def tiny_engine(grid: Grid, *, zero_stage: int, num_microbatches: int = 1, **overrides: Any) -> Any:
    """An engine over the tiny model; `overrides` replace its arguments or, as `model`, the model."""
    from parallel.engine import Engine

    arguments: dict[str, Any] = {
        "parallel": ParallelConfig(zero_stage=zero_stage),
        "optimizer": OPTIMIZER,
        "precision": "fp32",
        "z_loss": Z_LOSS,
        "micro_batch_size": GLOBAL_BATCH // (grid.dp_size * num_microbatches),
        "num_microbatches": num_microbatches,
    }
    arguments |= overrides
    return Engine(arguments.pop("model", None) or tiny_model(), grid=grid, **arguments)


def learning_rate(step: int) -> float:
    """Differs from step to step."""
    return LR * (1.0 - 0.1 * step)


def train(engine: Any, steps: range) -> list[tuple[float, float, float, int]]:
    """What each step measured, as plain tuples (loss, z_loss, grad_norm, tokens)."""
    return [
        tuple(engine.step(microbatches(engine.grid, step, engine.num_microbatches), learning_rate(step))[:4])
        for step in steps
    ]
