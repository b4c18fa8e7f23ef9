"""A tiny Griffin whose every parameter matters, and a run directory that holds it."""

import dataclasses
import json
from pathlib import Path

import torch

from models.checkpoint import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    META,
    TOKENIZER,
    checkpoint_name,
    describe_file,
    tensor_file,
    tensor_key,
    write_tensors,
)
from models.config import ModelConfig
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import LocalAttentionConfig
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig


def griffin_config(vocab_size: int = 61, width: int = 32, window: int = 5) -> ModelConfig:
    """Four heads, as many gate blocks, grouped keys, an MLP that is not a multiple of the width."""
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        layers=("rglru", "rglru", "local_attention", "rglru"),
        mixers=MixerConfigs(
            rglru=RGLRUConfig(width=width, gate_blocks=4),
            local_attention=LocalAttentionConfig(
                heads=4, kv_heads=2, head_dim=width // 4, window=window, rotary_fraction=0.5, output_bias=True
            ),
        ),
        mlp=MLPConfig(width=44),
        norm_eps=1e-5,
        logit_soft_cap=20.0,
    )


def griffin(config: ModelConfig | None = None, seed: int = 0) -> LM:
    """Weights far from their initial values: no bias is zero, no norm one, every conv tap counts."""
    model = LM(config or griffin_config(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.1 if name == "embed.weight" else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return model


def padded_griffin(spoken: int, padding: int) -> LM:
    """Rows beyond the `spoken` tokens that are the likeliest everywhere: each pair holds a row and its negative."""
    model = griffin(griffin_config(vocab_size=spoken + padding)).eval()
    with torch.no_grad():
        rows = 10.0 * torch.randn(padding // 2, model.config.width, generator=torch.Generator().manual_seed(0))
        model.embed.weight[spoken:] = torch.cat([rows, -rows])
    return model


def write_run(directory: Path, model: LM, tokenizer: Path | None, step: int = 20) -> Path:
    """A run directory with one checkpoint of `model`, and returns the directory."""
    checkpoint = directory / "checkpoints" / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    weights = dict(model.named_parameters())
    tensors = {tensor_key("weight", name): parameter.detach() for name, parameter in weights.items()}
    write_tensors(checkpoint / tensor_file(0), tensors)
    (checkpoint / INDEX).write_text(json.dumps(dict.fromkeys(tensors, tensor_file(0))))
    meta = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "parameters": {name: list(p.shape) for name, p in weights.items()},
        "model": dataclasses.asdict(model.config),
        "environment": {"git_revision": "0123456789abcdef"},
    }
    (checkpoint / META).write_text(json.dumps(meta))
    if tokenizer is not None:
        (checkpoint / TOKENIZER).write_bytes(tokenizer.read_bytes())
    files = {path.name: describe_file(path) for path in checkpoint.iterdir()}
    (checkpoint / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}))
    rows = [
        {"step": step, "tokens": 1000 * step, "loss": 3.0},
        {"step": step, "val_loss": 3.25, "val_bits_per_byte": 2.5},
        {"step": 2 * step, "tokens": 2000 * step, "loss": 2.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
