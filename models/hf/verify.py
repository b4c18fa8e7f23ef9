"""Whether a Hugging Face directory is the model and the tokenizer it was written from.

What the original says is kept as `Expected`, so that the original need not be in memory beside the directory's model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.hf.formats import Loaded
from models.lm import LM

TOLERANCE = 1e-4
"""Largest difference between logits, relative to the largest logit."""

MIN_TOP_1 = 0.99
"""Share of positions with the same most likely token; equal logits may differ there in nothing but near ties."""

ROWS, MAX_TOKENS = 2, 512
"""Random rows compared, and the most tokens of a row."""

MAX_LOGITS = 2**26
"""Of a row: with large vocabularies rows are shorter, so that what is kept stays small beside the model."""

PROMPT, GENERATED = 8, 16
"""Tokens that are continued greedily, and by how many."""

PROBES = (
    "",
    " ",
    "  leading, trailing and    inner spaces   ",
    "\ttabs\t\tand\n\n\nnew lines\r\n",
    "café, ﬁne, ½, Ω, 中文, 日本語, 한국어, עברית, 😀👩‍👩‍👧, e\u0301, \u00a0\u3000\u2581",
    "<s> </s> <pad> <unk> <0x0A> <0xFF> [INST] \\n \x00 \x7f",
    "0 12 345 1e-4 3.14159 ---- ==== ____ ####",
)


@dataclass(frozen=True)
class Rows:
    """Token ids to compare on: `[1, T]` each, and how many of the vocabulary's rows a tokenizer has tokens for."""

    ids: tuple[Tensor, ...]
    spoken: int


@dataclass(frozen=True)
class Expected:
    """Logits `[1, T, N]` of each of the rows, the greedy continuation of the first one's beginning, and the logits that
    each of its tokens was chosen from, `[GENERATED, N]`."""

    logits: tuple[Tensor, ...]
    continuation: Tensor
    choices: Tensor


class Agreement(NamedTuple):
    """What was compared.

    Attributes:
        relative_difference: the largest of the logits, over the largest logit.
        top_1: share of positions with the same most likely token.
        logits_tokens, generated_tokens, texts: how much was compared; no token is generated where the class cannot
            run, no text tokenized where the model has no tokenizer.
        how: what the directory was read with.
        rounding: of a directory in another dtype than fp32, relative difference and agreement of the rounded model and
            the original.
    """

    relative_difference: float
    top_1: float
    logits_tokens: int
    generated_tokens: int
    texts: int
    how: str
    rounding: tuple[float, float] | None = None


def longest_window(config: ModelConfig) -> int:
    """Of the attention layers; 64 without one, some chunks of a recurrence."""
    return max(64, *(getattr(config.mixer(kind), "window", 0) for kind in set(config.layers)))


def row_length(vocab_size: int) -> int:
    """The most tokens of a row."""
    return max(32, min(MAX_TOKENS, MAX_LOGITS // vocab_size))


def rows_to_compare(vocab_size: int, window: int, tokenizer: Tokenizer | None, texts: Sequence[str]) -> Rows:
    """Random tokens, more than fill an attention window where that is possible, and real text."""
    longest = row_length(vocab_size)
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, min(window + 8, longest))
    rows = list(torch.randint(vocab_size, shape, generator=generator).split(1))
    if tokenizer is not None:
        rows += [torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)][:longest]]) for text in texts]
    return Rows(tuple(rows), vocab_size if tokenizer is None else tokenizer.vocab_size)


@torch.no_grad()
def expected(model: LM, rows: Rows) -> Expected:
    """What `model` says of `rows`."""
    ids, choices = rows.ids[0][:, :PROMPT], []
    for _ in range(GENERATED):
        last = logits_of(model, ids)[:, -1].clone()
        last[:, rows.spoken :] = -torch.inf
        choices.append(last)
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    return Expected(tuple(logits_of(model, row) for row in rows.ids), ids, torch.cat(choices))


def compare(rows: Rows, original: Expected, loaded: Loaded) -> Agreement:
    """
    Raises:
        ValueError: logits, most likely tokens or the greedy continuation differ.
    """
    found = [_compare_logits(loaded.logits(row), logits) for row, logits in zip(rows.ids, original.logits, strict=True)]
    return Agreement(
        relative_difference=max(difference for difference, _ in found),
        top_1=min(share for _, share in found),
        logits_tokens=sum(row.numel() for row in rows.ids),
        generated_tokens=0 if loaded.generate is None else _compare_greedy(rows, original, loaded),
        texts=0,
        how=loaded.how,
    )


def rounding(original: Expected, rounded: Expected) -> tuple[float, float]:
    """Relative difference and agreement between a model and the one that its rounded weights make."""
    pairs = [_difference(ours, theirs) for ours, theirs in zip(rounded.logits, original.logits, strict=True)]
    return max(difference / scale for difference, scale, _ in pairs), min(share for *_, share in pairs)


def compare_tokenizers(ours: Tokenizer, theirs: PreTrainedTokenizerBase, texts: Sequence[str]) -> int:
    """How many texts were compared. Raises ValueError where ids or decoded text differ."""
    for text in (*PROBES, *texts):
        ids = ours.encode(text)
        found = theirs(text, add_special_tokens=False).input_ids
        if found != ids or theirs.decode(found) != text:
            raise ValueError(f"tokenizer: {text[:60]!r} becomes {found[:20]} in transformers, {ids[:20]} in Rondo")
    return len(PROBES) + len(texts)


def _difference(found: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """Largest difference, largest entry, and share of positions with the same most likely token."""
    agreeing = (found.argmax(dim=-1) == wanted.argmax(dim=-1)).double().mean().item()
    return (found - wanted).abs().max().item(), wanted.abs().max().item(), agreeing


def _compare_logits(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    difference, scale, agreeing = _difference(found, wanted)
    if not difference <= TOLERANCE * scale:  # also where one of them is not a number
        raise ValueError(f"logits differ by {difference:.2e} where the largest is {scale:.2e}")
    if agreeing < MIN_TOP_1:
        raise ValueError(f"the most likely token is the same at {agreeing:.1%} of the positions only")
    return difference / scale, agreeing


def _compare_greedy(rows: Rows, original: Expected, loaded: Loaded) -> int:
    """Tokens generated alike through their cache. One that our model finds as likely ends the comparison: what follows
    it has another past."""
    assert loaded.generate is not None
    prompt = rows.ids[0][:, :PROMPT]
    out = loaded.generate(prompt, GENERATED)[0, prompt.shape[1] :]
    tolerance = TOLERANCE * original.logits[0].abs().max().item()
    wanted = original.continuation[0, prompt.shape[1] :]
    for i, (found, choices) in enumerate(zip(out.tolist(), original.choices, strict=False)):
        if (choices.max() - choices[found]).item() > tolerance:
            raise ValueError("generate() takes other tokens than the model it was written from")
        if found != wanted[i]:
            return i
    return len(out)


def logits_of(model: LM, input_ids: Tensor) -> Tensor:
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return model(input_ids, positions)[0]
