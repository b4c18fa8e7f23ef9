"""Whether a Hugging Face directory is the model and the tokenizer it was written from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from data.tokenizer import Tokenizer
from models.lm import LM

TOLERANCE = 1e-4
"""Largest difference between logits, relative to the largest logit."""

MIN_TOP_1 = 0.99
"""Share of positions with the same most likely token; equal logits may differ there in nothing but near ties."""

ROWS, MAX_TOKENS = 2, 512
"""Random rows compared, and the most tokens of a row."""

PROBES = (
    "",
    " ",
    "  leading, trailing and    inner spaces   ",
    "\ttabs\t\tand\n\n\nnew lines\r\n",
    "café, ﬁne, ½, Ω, 中文, 日本語, 한국어, עברית, 😀👩‍👩‍👧, e\u0301, \u00a0\u3000\u2581",
    "<s> </s> <pad> <unk> <0x0A> <0xFF> [INST] \\n \x00 \x7f",
    "0 12 345 1e-4 3.14159 ---- ==== ____ ####",
)


class Agreement(NamedTuple):
    """What was compared: the largest relative difference over `logits_tokens` tokens, and `texts` texts."""

    relative_difference: float
    logits_tokens: int
    generated_tokens: int
    texts: int


def verify_directory(directory: Path, model: LM, tokenizer: Tokenizer, texts: Sequence[str] = ()) -> Agreement:
    """Loads `directory` with transformers and compares it with what it was written from.

    Args:
        texts: real text, compared besides random tokens and `PROBES`.

    Raises:
        ValueError: logits, most likely tokens, greedy continuation, token ids or decoded text differ.
    """
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in (*PROBES, *texts):
        _compare_text(tokenizer, their_tokenizer, text)
    window = getattr(theirs.config, "attention_window_size", 0)
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, min(window + 8, MAX_TOKENS))
    rows = [torch.randint(model.config.vocab_size, shape, generator=generator)]
    rows += [torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)][:MAX_TOKENS]]) for text in texts]
    worst = max(_logit_difference(model, theirs, input_ids) for input_ids in rows)
    return Agreement(
        relative_difference=worst,
        logits_tokens=sum(input_ids.numel() for input_ids in rows),
        generated_tokens=_compare_greedy(model, theirs, rows[0][:1, :8], tokenizer.vocab_size),
        texts=len(PROBES) + len(texts),
    )


def _compare_text(ours: Tokenizer, theirs: PreTrainedTokenizerBase, text: str) -> None:
    expected = ours.encode(text)
    found = theirs(text, add_special_tokens=False).input_ids
    if found != expected or theirs.decode(found) != text:
        raise ValueError(f"tokenizer: {text[:60]!r} becomes {found[:20]} in transformers, {expected[:20]} in Rondo")


@torch.no_grad()
def _logit_difference(ours: LM, theirs: Any, input_ids: Tensor) -> float:
    expected = _logits(ours, input_ids)
    found = theirs(input_ids, use_cache=False).logits
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * scale:  # also where one of them is not a number
        raise ValueError(f"logits differ by {difference:.2e} where the largest is {scale:.2e}")
    agreeing = (found.argmax(dim=-1) == expected.argmax(dim=-1)).double().mean().item()
    if agreeing < MIN_TOP_1:
        raise ValueError(f"the most likely token is the same at {agreeing:.1%} of the positions only")
    return difference / scale


@torch.no_grad()
def _compare_greedy(ours: LM, theirs: Any, prompt: Tensor, vocab_size: int) -> int:
    """Generates through their cache; every token must be one of the tokenizer's that is most likely in our model after
    what stands before it."""
    out = theirs.generate(prompt, max_new_tokens=16, do_sample=False)
    logits = _logits(ours, out)[0, prompt.shape[1] - 1 : -1]
    tolerance = TOLERANCE * logits.abs().max().item()
    logits[:, vocab_size:] = -torch.inf
    chosen = logits.gather(-1, out[0, prompt.shape[1] :, None]).squeeze(-1)
    if (logits.amax(dim=-1) - chosen).max().item() > tolerance:
        raise ValueError("generate() takes other tokens than the model it was written from")
    return len(chosen)


def _logits(model: LM, input_ids: Tensor) -> Tensor:
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return model(input_ids, positions)[0]
