"""A model and its tokenizer from whatever a user names, in one process."""

from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from models.lm import LM
from models.restore import resolve_checkpoint, restore_model, tokenizer_path


def load(path: Path, device: torch.device | str = "cpu") -> tuple[LM, Tokenizer]:
    """
    Args:
        path: a checkpoint, or a run directory, of which the newest intact checkpoint is taken.

    Raises:
        ValueError: `path` is neither, the checkpoint is damaged, or the run was trained on tokens without a tokenizer.
    """
    checkpoint = resolve_checkpoint(path)
    tokenizer = tokenizer_path(checkpoint)
    if tokenizer is None:
        raise ValueError(f"{checkpoint}: has no tokenizer.model; copy there the tokenizer its corpus was made with")
    return restore_model(checkpoint, device, verified=True).eval(), Tokenizer(tokenizer)
