"""The model card: what an exported model is, how it was trained, how to use it and what to mind."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
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


def model_card(
    name: str, model: LM, checkpoint: Path, meta: dict[str, Any], bos_token: str, agreement: Agreement
) -> str:
    """README.md of an exported model.

    Args:
        name: of the directory.
        checkpoint, meta: where the model came from, and what that checkpoint's `meta.json` says.
        agreement: how it was compared with the original.
    """
    facts = [*_architecture(model), *_training(checkpoint, meta), *_comparison(agreement)]
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


def _training(checkpoint: Path, meta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """From the checkpoint itself, and from the metrics of the run it lies in, if it does."""
    step = int(meta["step"])
    yield "Training steps", f"{step:,}"
    rows = _metrics(checkpoint.resolve().parent.parent / "metrics.jsonl", step)
    tokens = [row["tokens"] for row in rows if row.get("tokens")]
    if tokens:
        yield "Training tokens", f"{tokens[-1]:,}"
    for label, key in (("Held-out loss, nats a token", "val_loss"), ("Held-out bits per byte", "val_bits_per_byte")):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            yield label, f"{values[-1]:.4f}"
    environment = meta.get("environment") or {}
    if environment.get("git_revision"):
        yield "Rondo revision", f"`{environment['git_revision']}`"


def _metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows up to a step, without a line that a kill cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= last_step:
            rows.append(row)
    return rows


def _comparison(agreement: Agreement) -> Iterator[tuple[str, str]]:
    difference, tokens = f"{agreement.relative_difference:.0e}", f"{agreement.logits_tokens:,}"
    yield (
        "Checked against the original",
        (
            f"logits within {difference} of the largest over {tokens} tokens, greedy generation, "
            f"token ids and decoded text of {agreement.texts} texts"
        ),
    )
