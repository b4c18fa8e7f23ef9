"""The model card: what an exported model is, how it was trained, how to use it and what to mind."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from models.config import ModelConfig
from models.hf.formats import Format
from models.hf.verify import Agreement

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

A {parameters} parameter language model of {mixers} layers, trained with Rondo and stored as `{architecture}`
({library}). It is a base model: it continues text.

```python
{example}
```

## Facts

| | |
|---|---|
{facts}

## What to mind

{notes}
"""

EXAMPLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{options})
model = AutoModelForCausalLM.from_pretrained("{name}"{options})
inputs = tokenizer("The beginning of a document", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0], skip_special_tokens=True))"""

FIGURES = {
    "tokens": ("Training tokens", ",.0f"),
    "val_loss": ("Held-out loss, nats a token", ".4f"),
    "val_bits_per_byte": ("Held-out bits per byte", ".4f"),
}
"""Figures of a run that a card tells: by their names there, how it calls and writes them."""


def model_card(
    name: str,
    config: ModelConfig,
    stored_as: Format,
    meta: Mapping[str, Any],
    figures: Mapping[str, float],
    *,
    bos_token: str | None,
    dtype: str,
    agreement: Agreement,
) -> str:
    """README.md of an exported model.

    Args:
        name: of the directory.
        meta: what the checkpoint's `meta.json` says.
        figures: of the run at that step, those of `FIGURES` that are known.
        bos_token: that documents began with; None where the directory holds no tokenizer.
        dtype: of the stored weights.
        agreement: how it was compared with the original.
    """
    facts = [
        *_architecture(config),
        ("Stored in", dtype if dtype == "float32" else f"{dtype}, decays and recurrent weights in float32"),
        *_training(meta, figures),
        *_comparison(agreement),
    ]
    return CARD.format(
        name=name,
        tags="\n".join(f"- {tag}" for tag in dict.fromkeys((stored_as.model_type, "rondo"))),
        architecture=stored_as.architecture,
        library=stored_as.library,
        mixers=" and ".join(dict.fromkeys(config.layers)),
        parameters=f"{config.num_params():,}",
        example=EXAMPLE.format(name=name, options=f", {stored_as.snippet}" if stored_as.snippet else ""),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts),
        notes="\n".join(f"- {note}" for note in (*stored_as.notes, _on_tokens(bos_token))),
    )


def _on_tokens(bos_token: str | None) -> str:
    if bos_token is None:
        return "The directory holds no tokenizer: the model was trained on token ids made elsewhere."
    return (
        f"Every prompt should begin with `{bos_token}`, as the documents did in training; the tokenizer puts it there."
    )


def _architecture(config: ModelConfig) -> Iterator[tuple[str, str]]:
    runs = [(kind, len(list(group))) for kind, group in groupby(config.layers)]
    yield "Parameters", f"{config.num_params():,}"
    yield "Width", f"{config.width:,}"
    yield f"{len(config.layers)} layers", ", ".join(f"{count} {kind}" for kind, count in runs)
    for kind, label in (("local_attention", "Local attention"), ("attention", "Attention")):
        if kind in config.layers:
            attention = config.mixer(kind)
            window = f", window of {attention.window:,} tokens" if kind == "local_attention" else ""
            yield label, f"{attention.heads} heads, {attention.kv_heads} for keys{window}"
    yield "Vocabulary", f"{config.vocab_size:,}"


def _training(meta: Mapping[str, Any], figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    yield "Training steps", f"{meta['step']:,}"
    for key, (label, form) in FIGURES.items():
        if key in figures:
            yield label, format(figures[key], form)
    environment = meta.get("environment") or {}
    if environment.get("git_revision"):
        yield "Rondo revision", f"`{environment['git_revision']}`"
    if environment.get("imported_from"):
        yield "Started from", f"{environment['imported_from']}"


def _comparison(agreement: Agreement) -> Iterator[tuple[str, str]]:
    yield "Checked against the original", agreement.how
    difference, tokens = f"{agreement.relative_difference:.0e}", f"{agreement.logits_tokens:,}"
    alike = f"the same most likely token at {agreement.top_1:.1%} of the positions"
    yield "Logits", f"within {difference} of the largest over {tokens} tokens, {alike}"
    if agreement.rounding is not None:
        change, share = agreement.rounding
        alike = f"most likely tokens agree at {share:.1%}"
        yield "Rounding the weights", f"moves logits by {change:.0e} of the largest, {alike}"
    if agreement.generated_tokens:
        yield "Generation", f"{agreement.generated_tokens} tokens alike"
    if agreement.texts:
        yield "Tokenizer", f"ids and decoded text of {agreement.texts} texts alike"
