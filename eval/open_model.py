"""A model to evaluate from whatever a user names."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.tokenizer import Tokenizer
from eval.load import check_vocabulary, load_checkpoint
from eval.model import EvalModel, LocalModel
from models.checkpoint import MANIFEST, META

MODEL_FILES = (
    "*config.json",
    "*.safetensors*",
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.py",
)
"""What of a Hugging Face directory is the model."""


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

    settings = _settings(path)
    kind = settings.get("model_type")
    if by_model_type(str(kind)) is not None:
        own = open_tokenizer(open_directory(path))
        tokenizer: Any = ForeignTokenizer(path) if own is None else Tokenizer(own)
        model = load_directory(path).to(device)
        check_vocabulary(f"{path}: its tokenizer", tokenizer.vocab_size, model.config.vocab_size)
        local = LocalModel(model, tokenizer, batch_size=batch_size)
        return Opened(local, f"{path} ({kind}, as Rondo's own)", _digest(path))
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{path}: a Hugging Face directory without *.safetensors; export or download its weights")
    _require_class(path, settings, trust_remote_code)
    try:
        foreign = ForeignModel(path, device, batch_size=batch_size, trust_remote_code=trust_remote_code)
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"{path}: transformers cannot load its {kind!r} here ({error}); install what it names"
        ) from error
    return Opened(foreign, f"{path} ({kind}, by transformers)", _digest(path))


def _require_class(path: Path, settings: dict[str, Any], trust_remote_code: bool) -> None:
    """Raises ValueError unless transformers has the class, or the directory brings it and may run it."""
    import transformers

    kind, known = settings.get("model_type"), transformers.CONFIG_MAPPING
    if kind in known or (trust_remote_code and settings.get("auto_map")):
        return
    where = path / "config.json"
    if settings.get("auto_map"):
        code = ", ".join(sorted(file.name for file in path.glob("*.py"))) or "files that lie elsewhere"
        raise ValueError(
            f"{where}: auto_map: {kind!r} is a class of {code}, which do not run unasked; read them, then give "
            "--trust-remote-code"
        )
    close = difflib.get_close_matches(str(kind), known.keys(), n=1)
    raise ValueError(
        f"{where}: model_type: {kind!r}; transformers {transformers.__version__} has no such class, and the directory "
        "brings none; " + (f"did you mean {close[0]}?" if close else "install the version that it was saved with")
    )


def _settings(path: Path) -> dict[str, Any]:
    """What `config.json` says."""
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: cannot be read ({error}); fetch it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path / 'config.json'}: holds no mapping; fetch it again")
    return settings


def _digest(path: Path) -> str:
    """Of a directory's configuration, tokenizer and code, and the sizes and times of its weights; of nothing that an
    evaluation leaves there."""
    found = hashlib.sha256()
    for file in sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}):
        found.update(file.name.encode())
        if file.suffix == ".safetensors":
            found.update(f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        else:
            found.update(file.read_bytes())
    return found.hexdigest()
