"""A trained model and its figures back from a run directory or checkpoint, in one process."""

import json
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import META, TOKENIZER, CheckpointError, latest_good, load_weights, read_meta, verify
from models.config import ModelConfig
from models.lm import LM
from models.plain import from_plain


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is, verified, or the newest intact one of the run directory that it is.

    Raises:
        CheckpointError: it is neither, the checkpoint is damaged, or the run has no intact one.
    """
    if (path / META).is_file():
        verify(path)
        return path
    if (path / "config.json").is_file():
        raise CheckpointError(f"{path}: a Hugging Face directory, no checkpoint; load it with transformers")
    if not (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: neither a run directory nor a checkpoint; name one that train.py wrote")
    checkpoint, skipped = latest_good(path / "checkpoints")
    if checkpoint is None:
        reasons = "".join(f"; {reason}" for reason in skipped)
        raise CheckpointError(f"{path}: no intact checkpoint{reasons}; train until one is saved")
    return checkpoint


def restore_model(checkpoint: Path, device: torch.device | str = "cpu", *, verified: bool = False) -> LM:
    """The model of a checkpoint, in fp32.

    Args:
        verified: `resolve_checkpoint` returned this one; its files are not hashed again.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not say what model it holds.
    """
    model = LM(read_config(checkpoint), device_type=torch.device(device).type)
    load_weights(checkpoint, model, verified=verified)
    return model.to(device)


def read_config(checkpoint: Path) -> ModelConfig:
    """What model a checkpoint holds; implementations are left to be chosen for the device at hand.

    Raises:
        CheckpointError: it does not say.
    """
    meta = read_meta(checkpoint)
    if "model" not in meta:
        raise CheckpointError(f"{checkpoint / META}: has no model entry; use a checkpoint that train.py wrote")
    return from_plain(ModelConfig, meta["model"] | {"impl": None})


def tokenizer_path(checkpoint: Path) -> Path | None:
    """The tokenizer that was saved with a checkpoint, None if the run had none."""
    path = checkpoint / TOKENIZER
    return path if path.is_file() else None


def read_metrics(run: Path) -> list[tuple[int, dict[str, Any] | None]]:
    """The lines of a run's metrics.jsonl with their numbers from 1, in the order they were written.

    A line that is no row with a step, as a kill cuts one off, is None. There are none where there is no file.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [(number, _parse_row(line)) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
