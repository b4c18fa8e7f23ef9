"""A model with every mixer, its gradients in one process, and the same from any arrangement of ranks.

In float64, so that what differs is wrong and not rounded otherwise.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.init import parameter_generator
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import AttentionConfig, LocalAttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from models.mixers.hgrn2 import HGRN2Config
from models.mixers.paralstm import ParaLSTMConfig
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig
from parallel.collectives import all_gather
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.partition import build_model
from parallel.traffic import counted

WIDTH = 32
TIME = 24
Z_LOSS = 1e-2
EVERY_MIXER = ("rglru", "hgrn2", "local_attention", "gated_deltanet", "paralstm", "hgrn2", "attention")


def config_of(
    layers: tuple[str, ...] = EVERY_MIXER,
    *,
    window: int = 16,
    tied: bool = True,
    changes: dict[str, dict[str, Any]] | None = None,
) -> ModelConfig:
    """Windows longer than a slice of 12 or 6 tokens, grouped keys and values, a vocabulary that nothing divides.

    `changes` replace settings of a mixer, by its name, and of the model under the name `model`.
    """
    settings: dict[str, Any] = {
        "attention": AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm="head"),
        "gated_deltanet": GatedDeltaNetConfig(heads=4, head_dim=4, value_heads=8, negative_eigenvalues=True),
        "hgrn2": HGRN2Config(heads=4, conv_width=3),
        "local_attention": LocalAttentionConfig(heads=4, kv_heads=1, head_dim=8, window=window, output_bias=True),
        "paralstm": ParaLSTMConfig(width=WIDTH, heads=4),
        "rglru": RGLRUConfig(width=WIDTH, gate_blocks=4),
    }
    changes = dict(changes or {})
    of_model = changes.pop("model", {})
    mixers = MixerConfigs(**settings | {kind: replace(settings[kind], **new) for kind, new in changes.items()})
    config = ModelConfig(
        vocab_size=61, width=WIDTH, layers=layers, mixers=mixers, mlp=MLPConfig(width=44), tie_embeddings=tied
    )
    return replace(config, **of_model)


def batch(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, positions, labels: documents that end inside slices, at their borders (6, 12) and span several."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (rows, TIME + 1), generator=generator)
    positions = torch.arange(TIME).repeat(rows, 1)
    for row, cuts in enumerate(((5, 6, 12, 13, 20), (), (12,), (1, 18))[:rows]):
        for cut in cuts:
            positions[row, cut:] = torch.arange(TIME - cut)
    labels = tokens[:, 1:].clone()
    labels[:, :-1][positions[:, 1:] == 0] = -100
    labels[0, 3:9] = -100
    return tokens[:, :-1], positions, labels


def noise(name: str, shape: torch.Size) -> Tensor:
    """What is added to initial weights, so that none is zero or one."""
    return 0.2 * torch.randn(shape, generator=parameter_generator(1, name), dtype=torch.float64)


def loss_of(nll: Tensor, log_z: Tensor) -> Tensor:
    return nll.sum() + Z_LOSS * log_z.square().sum()


def alone(config: ModelConfig) -> dict[str, Tensor]:
    """nll, log_z and every gradient in one process."""
    model = LM(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += noise(name, parameter.shape)
    input_ids, positions, labels = batch()
    nll, log_z = model(input_ids, positions, labels)
    loss_of(nll, log_z).backward()
    return {"nll": nll.detach(), "log_z": log_z.detach()} | {name: p.grad for name, p in model.named_parameters()}


def together(
    grid: Grid,
    sequence: int,
    tensor: int,
    settings: dict[str, Any] | None = None,
    sharded_norms: bool = False,
    **further: Any,
) -> tuple[dict[str, Tensor], Any]:
    """The same of `config_of(**settings)` on all ranks, whole again, and what travelled. `further` goes into the ranks'
    configuration."""
    config = config_of(**(settings or {}))
    grid = grid.arranged(sequence=sequence, tensor=tensor)
    parallel = ParallelConfig(sequence=sequence, tensor=tensor, sequence_sharded_norms=sharded_norms, **further)
    model, _, partition = build_model(config, grid, seed=0, sequence_length=TIME, parallel=parallel)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += partition.part(name, noise(name, partition.shapes[name]))
    axis, slices = grid.axes["tensor"], grid.axes["sequence"]
    here = slice(slices.index * TIME // slices.size, (slices.index + 1) * TIME // slices.size)
    with counted(model) as traffic:
        nll, log_z = model(*(z[:, here] for z in batch()))
        loss_of(nll, log_z).backward()
    found = {key: torch.cat(all_gather(z, slices).unbind(0), dim=1) for key, z in (("nll", nll), ("log_z", log_z))}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = all_gather(parameter.grad, slices).sum(0)
        if name in partition.cuts:
            gradient = partition.whole(name, all_gather(gradient, axis).unbind(0))
        found[name] = gradient
    return found, traffic.volumes
