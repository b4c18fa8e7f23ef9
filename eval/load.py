"""A model and its tokenizer from whatever a user names, in one process."""

import argparse
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
        ValueError: `path` is neither, the checkpoint is damaged, the run was trained on tokens without a tokenizer, or
            the tokenizer is of another model.
    """
    model, tokenizer, checkpoint = load_checkpoint(path, device)
    if tokenizer is None:
        raise ValueError(f"{checkpoint}: has no tokenizer.model; copy there the tokenizer its corpus was made with")
    return model, tokenizer


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[LM, Tokenizer | None, Path]:
    """As `load`, and the checkpoint; the tokenizer is None where the run was trained on tokens that are no text."""
    checkpoint = resolve_checkpoint(path)
    tokenizer_file = tokenizer_path(checkpoint)
    tokenizer = None if tokenizer_file is None else Tokenizer(tokenizer_file)
    model = restore_model(checkpoint, device, verified=True).eval()
    if tokenizer is not None:
        check_vocabulary(str(tokenizer.path), tokenizer.vocab_size, model.config.vocab_size)
    return model, tokenizer, checkpoint


def check_vocabulary(tokenizer: str, tokens: int, vocab_size: int) -> None:
    """Raises ValueError if a tokenizer has tokens for which the model has no row; rows without a token are padding."""
    if tokens > vocab_size:
        raise ValueError(
            f"{tokenizer}: {tokens} tokens, but the model's vocab_size is {vocab_size}; put the tokenizer there that "
            "the model was trained with"
        )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_here(value: str) -> torch.device:
    """A device of this machine, for argparse."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(value)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < gpus):
        return device
    here = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
    raise argparse.ArgumentTypeError(f"value {value!r}; this machine has {here}; choose one, or leave --device out")
