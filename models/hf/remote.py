"""Any model as a directory that brings its own modelling files: `RondoForCausalLM`, loaded with `trust_remote_code`.

Weights have the names that `LM` gives them, behind `model.`, and `config.json` holds `ModelConfig` as it is.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.hf.flatten import flatten
from models.hf.formats import Format, Loaded, Stored, TokenIds
from models.hf.remote_process import RemoteModel
from models.plain import from_plain

ARCHITECTURE = "RondoForCausalLM"
PREFIX = "model."
"""Under which `RondoForCausalLM` holds its `LM`."""

NOTES = (
    "The modelling files are Rondo's own sources under flat names, in plain PyTorch; on a GPU its kernels are faster.",
    "Padding may be on either side; in a batch each row gives what it gives alone. Rows padded right cannot go on.",
    "`dtype=torch.bfloat16` leaves decays, recurrent weights and norms in fp32; casting a loaded model rounds them.",
    "A state cannot be rolled back: there is no generation with an assistant model.",
)


def _config_json(config: ModelConfig, ids: TokenIds) -> dict[str, Any]:
    model = dataclasses.asdict(config)
    del model["impl"]  # the files have one implementation of each op
    model["mixers"] = {kind: settings for kind, settings in model["mixers"].items() if kind in config.layers}
    return {
        "model_type": "rondo",
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_rondo.RondoConfig",
            "AutoModelForCausalLM": f"modeling_rondo.{ARCHITECTURE}",
        },
        "model": model,
        **ids._asdict(),
    }


def _model_config(values: Mapping[str, Any]) -> ModelConfig:
    model = values.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"config.json: model: {model!r}; must be a mapping, as an export writes it")
    try:
        return from_plain(ModelConfig, model)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.json: model: {error}") from error


def _tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Stored]:
    return [Stored(name=PREFIX + name, source=name, shape=tuple(shape)) for name, shape in shapes.items()]


def _write_files(config: ModelConfig, directory: Path) -> None:
    for name, text in flatten(config).items():
        (directory / name).write_text(text, encoding="utf-8")


def _load(directory: Path) -> Loaded:
    model = RemoteModel(directory)
    how = (
        f"loaded with transformers' `AutoModelForCausalLM` and the `{ARCHITECTURE}` of this directory, in a process "
        "without Rondo, logits and greedy generation compared"
    )
    return Loaded(model.logits, model.generate, how)


RONDO = Format(
    name="rondo",
    model_type="rondo",
    architecture=ARCHITECTURE,
    library="transformers 5 or later",
    fits=lambda config: [],
    config_json=_config_json,
    tensors=_tensors,
    model_config=_model_config,
    load_for_check=_load,
    write_files=_write_files,
    notes=NOTES,
    snippet="trust_remote_code=True",
)
