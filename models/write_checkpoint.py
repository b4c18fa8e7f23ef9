"""Writing a checkpoint that holds a model and no training yet, in one process and some tensors at a time.

`parallel/writer.py` writes those of a run, from all its ranks.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import (
    CONFIG,
    FORMAT_VERSION,
    INDEX,
    KINDS,
    MANIFEST,
    META,
    TOKENIZER,
    Kind,
    describe_file,
    tensor_file,
    tensor_key,
    write_tensors,
)
from models.config import ModelConfig

FILE_BYTES = 512 * 2**20
"""Of tensors that are held and written together; a larger one is written alone."""


def write_checkpoint(
    target: Path,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    config_yaml: str,
    environment: Mapping[str, Any],
    tokenizer: Path | None,
) -> None:
    """Writes `target`: the model's weights, moments of zero, step 0. It appears whole or not at all.

    Args:
        shapes: of all parameters, by name.
        read: a parameter's weight, fp32 on the CPU, contiguous; asked for once each.
        config_yaml, environment, tokenizer: stored with it.
    """
    staging = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        index: dict[str, str] = {}
        for number, group in enumerate(_grouped(shapes)):
            tensors = {
                tensor_key(kind, name): read(name) if kind == "weight" else torch.zeros(shapes[name])
                for kind, name in group
            }
            write_tensors(staging / tensor_file(number), tensors)
            index |= dict.fromkeys(tensors, tensor_file(number))
        meta = {
            "format_version": FORMAT_VERSION,
            "model": dataclasses.asdict(config),
            "parameters": {name: list(shape) for name, shape in shapes.items()},
            "num_updates": 0,
            "ranks": {"world_size": 0, "device": "none"},  # it holds no random number generator's state
            "step": 0,
            "progress": {"consumed_samples": 0},
            "environment": dict(environment),
        }
        for name, content in ((META, meta), (INDEX, index)):
            (staging / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (staging / CONFIG).write_text(config_yaml, encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, staging / TOKENIZER)
        files = {path.name: describe_file(path) for path in sorted(staging.iterdir())}
        manifest = {"format_version": FORMAT_VERSION, "files": files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _grouped(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[tuple[Kind, str]]]:
    """Weights and moments in order, as many together as FILE_BYTES hold."""
    group: list[tuple[Kind, str]] = []
    held = 0
    for kind in KINDS:
        for name, shape in shapes.items():
            size = torch.float32.itemsize * torch.Size(shape).numel()
            if group and held + size > FILE_BYTES:
                yield group
                group, held = [], 0
            group.append((kind, name))
            held += size
    yield group
