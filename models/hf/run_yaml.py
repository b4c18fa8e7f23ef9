"""The YAML of a run that trains an imported model on, to be completed by its data."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from models.config import ModelConfig

TEMPLATE = """\
# {title}
# Set data, then: torchrun --nproc-per-node N train.py {path}
name: {name}

model:
{model}

data:
  corpora: [{{path: data/corpora/CHANGE_ME}}]{tokenizer}
  sequence_length: {sequence_length}

train:
  steps: 10000
  batch_size: 256
  micro_batch_size: 1
  precision: bf16

optimizer: # the moments start from zero, so the learning rate rises from zero, too
  lr: 3e-5
  weight_decay: 0.1
  clip_norm: 1.0
  schedule: {{kind: cosine, warmup_steps: 500, final_fraction: 0.1}}

parallel: {{zero_stage: 2}}

checkpoint: {{every: 1000, keep_last: 3, resume: {resume}}}

eval: {{every: 1000, sequences: 256}}
"""


def run_yaml(config: ModelConfig, checkpoint: Path, path: Path, *, origin: str, has_tokenizer: bool) -> str:
    """A run whose model is `config` and that starts from `checkpoint`; `path` is where the YAML will lie."""
    note = (
        "" if has_tokenizer else " # of token ids made with the model's own tokenizer, which is no SentencePiece model"
    )
    return TEMPLATE.format(
        title=f"Training {origin} on.",
        path=path,
        name=path.stem,
        model=model_yaml(config),
        tokenizer=note,
        sequence_length=4096,
        resume=json.dumps(str(checkpoint.resolve())),
    )


def model_yaml(config: ModelConfig) -> str:
    """The lines of a run's `model` mapping, every setting included."""
    values = dataclasses.asdict(config)
    del values["impl"]  # chosen for the device at hand
    values["layers"] = _layers(config.layers)
    lines = []
    for key, value in values.items():
        if key == "mixers":
            lines.append("  mixers:")
            lines += [f"    {kind}: {_flow(settings)}" for kind, settings in value.items() if settings is not None]
        else:
            lines.append(f"  {key}: {_flow(value)}")
    return "\n".join(lines)


def _layers(layers: tuple[str, ...]) -> Any:
    """The shortest pattern that repeats, where there is one; the plain list where the depth is no multiple of it."""
    for length in range(1, len(layers) // 2 + 1):
        if len(layers) % length == 0 and all(a == b for a, b in pairwise(_chunks(layers, length))):
            return {"pattern": list(layers[:length]), "repeat": len(layers) // length}
    return list(layers)


def _chunks(layers: tuple[str, ...], length: int) -> list[tuple[str, ...]]:
    return [layers[i : i + length] for i in range(0, len(layers), length)]


def _flow(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(inner) for inner in value) + "]"
    return value if isinstance(value, str) else json.dumps(value)
