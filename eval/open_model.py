"""A model to evaluate from whatever a user names."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.tokenizer import Tokenizer
from eval.load import check_vocabulary, load_checkpoint
from eval.model import EvalModel, LocalModel
from models.checkpoint import MANIFEST, META


class Opened(NamedTuple):
    """A model, what it is in words, and what tells it from every other: a digest of its files."""

    model: EvalModel
    description: str
    digest: str


def open_model(
    path: Path, device: torch.device | str = "cpu", *, batch_size: int = 8, trust_remote_code: bool = False
) -> Opened:
    """
    Args:
        path: run directory, checkpoint, or a Hugging Face directory.
        trust_remote_code: whether the Python files of a Hugging Face directory may run.

    Raises:
        ValueError: it is none of these, or damaged; or tokenizer and model do not belong together.
    """
    if (path / "config.json").is_file() and not (path / META).is_file():
        return _open_directory(path, device, batch_size, trust_remote_code)
    model, tokenizer, checkpoint = load_checkpoint(path, device)
    digest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    return Opened(LocalModel(model, tokenizer, batch_size=batch_size), str(checkpoint), digest)


def _open_directory(path: Path, device: torch.device | str, batch_size: int, trust_remote_code: bool) -> Opened:
    """A model that Rondo has as its own, whose likelihoods it then finds in one pass; any other by its class."""
    from eval.foreign import ForeignModel, ForeignTokenizer  # transformers takes seconds to import
    from models.hf.importing import load_directory, open_directory, open_tokenizer
    from models.hf.registry import by_model_type

    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if by_model_type(kind) is not None:
        own = open_tokenizer(open_directory(path))
        tokenizer: Any = ForeignTokenizer(path) if own is None else Tokenizer(own)
        model = load_directory(path).to(device)
        check_vocabulary(f"{path}: its tokenizer", tokenizer.vocab_size, model.config.vocab_size)
        local = LocalModel(model, tokenizer, batch_size=batch_size)
        return Opened(local, f"{path} ({kind}, as Rondo's own)", _digest(path))
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{path}: a Hugging Face directory without *.safetensors; export or download its weights")
    try:
        foreign = ForeignModel(path, device, batch_size=batch_size, trust_remote_code=trust_remote_code)
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"{path}: transformers cannot load its {kind!r} here ({error}); install what it names"
        ) from error
    return Opened(foreign, f"{path} ({kind}, by transformers)", _digest(path))


def _digest(path: Path) -> str:
    """Of a directory's configuration, tokenizer and the sizes and times of its weights."""
    found = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".model", ".py"):
            found.update(file.read_bytes())
        elif file.is_file():
            found.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return found.hexdigest()
