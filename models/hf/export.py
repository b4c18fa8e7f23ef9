"""A trained model as a directory that transformers loads without Rondo."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from transformers import GenerationConfig

from data.tokenizer import Tokenizer
from models.checkpoint import read_meta
from models.hf.card import FIGURES, model_card
from models.hf.recurrentgemma import differences, to_hf_config, to_hf_weights
from models.hf.tokenizer import convert_tokenizer
from models.hf.verify import Agreement, verify_directory
from models.restore import read_metrics, resolve_checkpoint, restore_model, tokenizer_path


def export(source: Path, target: Path, texts: Sequence[str] = ()) -> Agreement:
    """Writes the model of a run directory or checkpoint to `target`, and proves that it is the same model there.

    It is written and verified beside `target` and then renamed: `target` exists only whole and right.

    Args:
        texts: real text to compare logits and token ids on, besides random tokens and difficult strings.

    Raises:
        ValueError: `source` holds no model, the model has no transformers class, `target` is in use, or what was
            written does not give the same logits, ids and texts; no file is left behind then.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty directory; name another one, or remove it")
    checkpoint = resolve_checkpoint(source)
    sentencepiece_model = tokenizer_path(checkpoint)
    if sentencepiece_model is None:
        raise ValueError(f"{checkpoint}: has no tokenizer.model; copy there the tokenizer its corpus was made with")
    model = restore_model(checkpoint, verified=True)
    obstacles = differences(model.config)
    if obstacles:
        raise ValueError(
            f"{source}: transformers has no class for this model; RecurrentGemma differs in\n  "
            + "\n  ".join(obstacles)
            + "\ntrain with these values to export to it, or use the model through python -m eval.generate"
        )
    tokenizer = Tokenizer(sentencepiece_model)
    token_ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        state = {name: w.contiguous() for name, w in to_hf_weights(weights, model.config.layers).items()}
        save_file(state, unfinished / "model.safetensors", metadata={"format": "pt"})
        to_hf_config(model.config, **token_ids).save_pretrained(unfinished)
        (unfinished / "model.safetensors").chmod((unfinished / "config.json").stat().st_mode)  # safetensors' is private
        padding = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None  # rows that no token has
        GenerationConfig(**token_ids, suppress_tokens=padding).save_pretrained(unfinished)
        fast_tokenizer = convert_tokenizer(sentencepiece_model)
        fast_tokenizer.save_pretrained(unfinished)
        try:
            agreement = verify_directory(unfinished, model, tokenizer, texts)
        except ValueError as error:
            raise ValueError(f"{target}: not written, because in transformers {error}; report this as a bug") from error
        meta = read_meta(checkpoint)
        figures = _figures(checkpoint.resolve().parent.parent, meta["step"])
        bos_token = str(fast_tokenizer.bos_token)
        card = model_card(target.name, model, meta, figures, bos_token=bos_token, agreement=agreement)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return agreement


def _figures(run: Path, step: int) -> dict[str, float]:
    """The newest figures for the card up to a step, none of a directory that holds no metrics."""
    rows = [row for _, row in read_metrics(run) if row is not None and row["step"] <= step]
    figures: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row["step"]):  # a resumed run has gone back: later lines of a step count
        figures |= {key: row[key] for key in FIGURES if isinstance(row.get(key), int | float)}
    return figures
