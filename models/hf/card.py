"""The model card: what an exported model is, how it was trained, how to use it and what to mind."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from models.hf.verify import Agreement
from models.lm import LM

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- griffin
- recurrent_gemma
- rondo
---

# {name}

A {parameters} parameter Griffin language model: gated linear recurrences alternating with local attention
([De et al., 2024](https://arxiv.org/abs/2402.19427)), trained with Rondo and stored as transformers' own
`RecurrentGemmaForCausalLM` (transformers 5 or later). It is a base model: it continues text.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("The beginning of a document", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0], skip_special_tokens=True))
```

## Facts

| | |
|---|---|
{facts}

## What to mind

- Generate from one prompt at a time, or from prompts of equal length: `RecurrentGemmaForCausalLM` does not mask
  padding in its convolutions, so a padded prompt is continued differently.
- After a `generate`, a prompt of a single token starts from the convolution state that the call before left on the
  model. Call `model(input_ids, use_cache=False)` in between; longer prompts start clean.
- Every prompt should begin with `{bos}`, as the documents did in training; the tokenizer puts it there.
"""


FIGURES = {
    "tokens": ("Training tokens", ",.0f"),
    "val_loss": ("Held-out loss, nats a token", ".4f"),
    "val_bits_per_byte": ("Held-out bits per byte", ".4f"),
}
"""Figures of a run that a card tells: by their names there, how it calls and writes them."""


def model_card(
    name: str,
    model: LM,
    meta: Mapping[str, Any],
    figures: Mapping[str, float],
    *,
    bos_token: str,
    agreement: Agreement,
) -> str:
    """README.md of an exported model.

    Args:
        name: of the directory.
        meta: what the checkpoint's `meta.json` says.
        figures: of the run at that step, those of `FIGURES` that are known.
        agreement: how it was compared with the original.
    """
    facts = [*_architecture(model), *_training(meta, figures), *_comparison(agreement)]
    return CARD.format(
        name=name,
        parameters=f"{model.num_params():,}",
        facts="\n".join(f"| {key} | {value} |" for key, value in facts),
        bos=bos_token,
    )


def _architecture(model: LM) -> Iterator[tuple[str, str]]:
    config = model.config
    runs = [(kind, len(list(group))) for kind, group in groupby(config.layers)]
    yield "Parameters", f"{model.num_params():,}"
    yield "Width", f"{config.width:,}"
    yield f"{len(config.layers)} layers", ", ".join(f"{count} {kind}" for kind, count in runs)
    if "local_attention" in config.layers:
        attention = config.mixer("local_attention")
        yield (
            "Attention",
            f"{attention.heads} heads, {attention.kv_heads} for keys, window of {attention.window:,} tokens",
        )
    yield "Vocabulary", f"{config.vocab_size:,}"


def _training(meta: Mapping[str, Any], figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    yield "Training steps", f"{meta['step']:,}"
    for key, (label, form) in FIGURES.items():
        if key in figures:
            yield label, format(figures[key], form)
    environment = meta.get("environment") or {}
    if environment.get("git_revision"):
        yield "Rondo revision", f"`{environment['git_revision']}`"


def _comparison(agreement: Agreement) -> Iterator[tuple[str, str]]:
    difference, tokens = f"{agreement.relative_difference:.0e}", f"{agreement.logits_tokens:,}"
    yield (
        "Checked against the original",
        (
            f"logits within {difference} of the largest over {tokens} tokens, greedy generation, "
            f"token ids and decoded text of {agreement.texts} texts"
        ),
    )
