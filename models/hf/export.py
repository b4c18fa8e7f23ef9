"""A trained model as a directory that other libraries load without Rondo."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from data.tokenizer import Tokenizer
from models.assemble import assemble
from models.checkpoint import TOKENIZER, read_meta, read_parameters, require_parameters
from models.config import ModelConfig
from models.hf.card import CARD, FIGURES, model_card
from models.hf.formats import Format, TokenIds, stays_fp32
from models.hf.registry import choose
from models.hf.tokenizer import convert_tokenizer
from models.hf.verify import (
    Agreement,
    Expected,
    Rows,
    compare,
    compare_tokenizers,
    expected,
    longest_window,
    rounding,
    rows_to_compare,
)
from models.hf.weights import MAX_SHARD_BYTES, WeightsFile, parameter_shapes, plan_files, write_weights
from models.restore import read_config, read_metrics, resolve_checkpoint, tokenizer_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights may be stored in; decays and recurrent weights are fp32 in any case (`formats.stays_fp32`)."""


@dataclass(frozen=True)
class Source:
    """What is exported: a verified checkpoint, its model and tokenizer."""

    checkpoint: Path
    config: ModelConfig
    tokenizer: Tokenizer | None

    def read(self, name: str) -> Tensor:
        """One parameter, fp32."""
        ((_, weight),) = read_parameters(self.checkpoint, [("weight", name)])
        return weight

    @property
    def token_ids(self) -> TokenIds:
        ours = self.tokenizer
        return TokenIds() if ours is None else TokenIds(ours.pad_id, ours.bos_id, ours.eos_id)


def export(
    source: Path,
    target: Path,
    texts: Sequence[str] = (),
    *,
    format_name: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    with_tokenizer: bool = True,
) -> Agreement:
    """Writes the model of a run directory or checkpoint to `target`, and proves that it is the same model there.

    It is written and verified beside `target` and then renamed: `target` exists only whole and right. The files are
    written first, then the original is asked, then what was written: one copy of the weights is in memory at a time.

    Args:
        texts: real text to compare logits and token ids on, besides random tokens and difficult strings.
        format_name: of `models/hf/registry.py`; by default the first that the model fits.
        dtype: of `DTYPES`.
        max_shard_bytes: of a file of weights.
        with_tokenizer: false for a model whose tokenizer is elsewhere.

    Raises:
        ValueError: `source` holds no model, no class has it, `target` is in use, or what was written does not give the
            same logits, ids and texts; no file is left behind then.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty directory; name another one, or remove it")
    original = _open(source, with_tokenizer)
    stored_as = choose(original.config, format_name)
    shapes = parameter_shapes(original.config)
    require_parameters(original.checkpoint, shapes)
    files = plan_files(stored_as.tensors(original.config, shapes), DTYPES[dtype], max_shard_bytes)
    texts = (CARD, *texts)
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write(original, stored_as, unfinished, files, dtype)
        try:
            agreement = _verify(original, stored_as, unfinished, texts, DTYPES[dtype])
        except ValueError as error:
            raise ValueError(
                f"{target}: not written, because as {stored_as.architecture} {error}; report this as a bug"
            ) from error
        meta = read_meta(original.checkpoint)
        figures = _figures(original.checkpoint.resolve().parent.parent, meta["step"])
        bos_token = _bos_token(unfinished) if original.tokenizer is not None else None
        card = model_card(
            target.name,
            original.config,
            stored_as,
            meta,
            figures,
            bos_token=bos_token,
            dtype=dtype,
            agreement=agreement,
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return agreement


def _open(source: Path, with_tokenizer: bool) -> Source:
    checkpoint = resolve_checkpoint(source)
    config = read_config(checkpoint)
    if not with_tokenizer:
        return Source(checkpoint, config, None)
    path = tokenizer_path(checkpoint)
    if path is None:
        raise ValueError(
            f"{checkpoint}: has no {TOKENIZER}; copy there the tokenizer its corpus was made with, or export the model "
            "alone with --no-tokenizer"
        )
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: has {tokenizer.vocab_size:,} pieces, but the model {config.vocab_size:,} rows; put the tokenizer "
            "its corpus was made with in its place"
        )
    return Source(checkpoint, config, tokenizer)


def _write(original: Source, stored_as: Format, directory: Path, files: list[WeightsFile], dtype: str) -> None:
    config, ids, ours = original.config, original.token_ids, original.tokenizer
    settings = stored_as.config_json(config, ids) | {"dtype": dtype, "transformers_version": transformers.__version__}
    (directory / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    padding = list(range(ours.vocab_size, config.vocab_size)) if ours is not None else []  # rows that no token has
    GenerationConfig(**ids._asdict(), suppress_tokens=padding or None).save_pretrained(directory)
    write_weights(directory, files, DTYPES[dtype], original.read)
    for file in files:  # safetensors makes its own private
        (directory / file.name).chmod((directory / "config.json").stat().st_mode)
    if ours is not None:
        convert_tokenizer(ours.path).save_pretrained(directory)
        shutil.copyfile(ours.path, directory / TOKENIZER)  # an import takes this one
    if stored_as.write_files is not None:
        stored_as.write_files(config, directory)


def _verify(
    original: Source, stored_as: Format, directory: Path, texts: Sequence[str], dtype: torch.dtype
) -> Agreement:
    ours = original.tokenizer
    num_texts = 0
    if ours is not None:
        num_texts = compare_tokenizers(ours, AutoTokenizer.from_pretrained(directory, trust_remote_code=False), texts)
    rows = rows_to_compare(original.config.vocab_size, longest_window(original.config), ours, texts)
    wanted, rounded = _ask(original, rows, dtype)
    agreement = compare(rows, wanted, stored_as.load_for_check(directory))
    return agreement._replace(texts=num_texts, rounding=rounded)


@torch.no_grad()
def _ask(original: Source, rows: Rows, dtype: torch.dtype) -> tuple[Expected, tuple[float, float] | None]:
    """What the model as it is stored says, and what rounding to `dtype` changes; the model is gone afterwards."""
    model = assemble(original.config, original.read).eval()
    exact = expected(model, rows)
    if dtype == torch.float32:
        return exact, None
    for name, parameter in model.named_parameters():
        if not stays_fp32(name):
            parameter.copy_(parameter.to(dtype))
    stored = expected(model, rows)
    return stored, rounding(exact, stored)


def _bos_token(directory: Path) -> str:
    return str(AutoTokenizer.from_pretrained(directory, trust_remote_code=False).bos_token)


def _figures(run: Path, step: int) -> dict[str, float]:
    """The newest figures for the card up to a step, none of a directory that holds no metrics."""
    rows = [row for _, row in read_metrics(run) if row is not None and row["step"] <= step]
    figures: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row["step"]):  # a resumed run has gone back: later lines of a step count
        figures |= {key: row[key] for key in FIGURES if isinstance(row.get(key), int | float)}
    return figures
