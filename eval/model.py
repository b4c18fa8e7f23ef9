"""What a task sees of a model: likelihoods of tokens, and continuations; here of an `LM` in one process.

Other views of the same: `eval/foreign.py` (a class of transformers) and `eval/in_loop.py` (ranks that train).
"""

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from data.synthetic import NO_TARGET
from eval.generate import TextTokenizer, generate, generate_texts, left_padded, prefill
from eval.sampling import Sampling
from models.lm import LM

SCORE_CHUNK = 1024
"""Tokens of a row that are scored at once: bounds the memory that a long document takes beside the state."""

SCORED_LOGITS = 2**25
"""Logits held at once."""

MIN_SHARED = 16
"""Tokens from which on a beginning that rows share is read once."""


class Row(NamedTuple):
    """A document, or its beginning: input ids and labels, int64 `[T]` each, -100 where nothing is asked."""

    input_ids: np.ndarray
    labels: np.ndarray


class Scores(NamedTuple):
    """Of a row's labels, `[T]` each: nll in nats, float64, and whether the label is the most likely token. 0 and False
    where nothing is asked."""

    nll: np.ndarray
    hit: np.ndarray

    @property
    def log_likelihood(self) -> float:
        return -float(self.nll.sum())


class EvalModel(Protocol):
    """
    Attributes:
        vocab_size: tokens that rows may hold.
        tokenizer: None where the model was trained on tokens that are no text.
        longest: the most tokens of a row; None where there is no limit.
        generates: whether it can continue prompts.
    """

    vocab_size: int
    tokenizer: Any
    longest: int | None
    generates: bool

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Every label, given all that stands before it in its row."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Each prompt's continuation up to EOS, which is left out."""
        ...

    def generate_texts(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stops: Sequence[str] = ()
    ) -> list[str]:
        """Each prompt's continuation up to EOS or the first stop string."""
        ...


def continuation(context: Sequence[int], tokens: Sequence[int]) -> Row:
    """The row that asks for `tokens` after `context`, which holds at least one token."""
    if not len(context):
        raise ValueError("context: empty; tokens are predicted after at least one token, for example BOS")
    ids = np.asarray([*context, *tokens], dtype=np.int64)
    labels = ids[1:].copy()
    labels[: len(context) - 1] = NO_TARGET
    return Row(ids[:-1], labels)


def encode_pair(tokenizer: TextTokenizer, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Token ids of BOS and `context`, and of `ending` after it, cut as lm-evaluation-harness cuts them.

    Blanks at the end of the context go to the ending, as words take the blank before them into their token. The ending
    is what the whole text has beyond as many tokens as the context has alone; where the two grow together so that none
    is left, it is encoded by itself.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, ending = context[:-blanks], context[-blanks:] + ending
    before, whole = tokenizer.encode(context), tokenizer.encode(context + ending)
    return [tokenizer.bos_id, *before], whole[len(before) :] or tokenizer.encode(ending)


def check_rows(rows: Sequence[Row], vocab_size: int, longest: int | None, way_out: str) -> None:
    """Raises ValueError unless rows have tokens below `vocab_size` and at most `longest` of them."""
    for i, (input_ids, labels) in enumerate(rows):
        if not len(input_ids):
            raise ValueError(f"rows[{i}]: empty; a row has at least one token, for example BOS")
        if longest is not None and len(input_ids) > longest:
            raise ValueError(f"rows[{i}]: {len(input_ids)} tokens; at most {longest} have a position; {way_out}")
        highest = max(int(input_ids.max()), int(labels.max()))
        if highest >= vocab_size or int(input_ids.min()) < 0:
            raise ValueError(
                f"rows[{i}]: token {highest if highest >= vocab_size else int(input_ids.min())}; the model has tokens "
                f"0 to {vocab_size - 1}; use the tokenizer that it was trained with"
            )


class LocalModel:
    """An `LM` in this process. A document of any length is scored exactly, in memory that does not grow with it.

    Args:
        batch_size: rows at a time. No score depends on it: rows are padded on the right, where nothing sees it, and
            prompts on the left with documents of their own.
    """

    longest: int | None = None
    generates = True

    def __init__(self, model: LM, tokenizer: TextTokenizer | None, *, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}; must be at least 1")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.device = model.embed.weight.device
        self.vocab_size = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """As `EvalModel.score`; a beginning without labels that several rows share is read once."""
        check_rows(rows, self.model.config.vocab_size, None, "")
        scores = [Scores(np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)) for ids, _ in rows]
        shared, alone = _by_beginning(rows)
        for group in batches(_longest_first(alone, lambda i: len(rows[i].input_ids)), self.batch_size):
            state = self.model.init_state(len(group), self.device)
            self._score(rows, scores, [(i, 0) for i in group], state)
        for members in batches(_longest_first(shared, lambda group: group[0]), self.batch_size):
            beginnings = [rows[group[0]].input_ids[:length] for length, group in members]
            _, state = prefill(self.model, *left_padded(beginnings, self.device))
            rest = [(i, length, n) for n, (length, group) in enumerate(members) for i in group]
            for part in batches(_longest_first(rest, lambda e: len(rows[e[0]].input_ids) - e[1]), self.batch_size):
                source = torch.tensor([n for _, _, n in part], device=self.device)
                self._score(rows, scores, [entry[:2] for entry in part], tree_map(itemgetter(source), state))
        return scores

    def _score(self, rows: Sequence[Row], scores: list[Scores], group: list[tuple[int, int]], state: Any) -> None:
        """Fills in scores of rows (number, tokens that `state` has read), those with the most left first."""
        done = 0
        while group:
            parts = [(i, slice(read + done, read + done + SCORE_CHUNK)) for i, read in group]
            state = tree_map(itemgetter(slice(len(group))), state)
            input_ids = _padded([rows[i].input_ids[here] for i, here in parts], 0).to(self.device)
            labels = _padded([rows[i].labels[here] for i, here in parts], NO_TARGET)
            positions = _padded([np.arange(here.start, here.start + input_ids.shape[1]) for _, here in parts], 0)
            x, state = self.model.hidden(input_ids, positions.to(self.device), state)
            asked = labels != NO_TARGET
            nll, hit = torch.zeros(labels.shape, dtype=torch.float64), torch.zeros(labels.shape, dtype=torch.bool)
            nll[asked], hit[asked] = self._judge(x[asked.to(self.device)], labels[asked].to(self.device))
            for n, (i, here) in enumerate(parts):
                size = len(rows[i].labels[here])
                scores[i].nll[here], scores[i].hit[here] = nll[n, :size].numpy(), hit[n, :size].numpy()
            done += SCORE_CHUNK
            group = [(i, read) for i, read in group if len(rows[i].input_ids) > read + done]

    def _judge(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """nll and hit of M labels, on the CPU, after what the head reads, `[M, D]`."""
        size = max(1, SCORED_LOGITS // self.model.config.vocab_size)
        nll, hit = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.bool)]
        for part, asked in zip(x.split(size), labels.split(size)):
            if len(asked):
                logits = self.model.head(part[None])[0]
                nll.append(torch.nn.functional.cross_entropy(logits, asked, reduction="none").double().cpu())
                hit.append((logits.argmax(dim=-1) == asked).cpu())
        return torch.cat(nll), torch.cat(hit)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id

        def of_batch(batch: list[Sequence[int]], numbers: list[int]) -> list[list[int]]:
            return generate(self.model, batch, sampling, eos_id=eos_id, vocab_size=self.vocab_size, rows=numbers)

        return in_batches(of_batch, prompts, self.batch_size)

    def generate_texts(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stops: Sequence[str] = ()
    ) -> list[str]:
        tokenizer = self.tokenizer
        assert tokenizer is not None, "tasks that need text are refused without a tokenizer"

        def of_batch(batch: list[Sequence[int]], numbers: list[int]) -> list[str]:
            return generate_texts(self.model, tokenizer, batch, sampling, stops=stops, rows=numbers)

        return in_batches(of_batch, prompts, self.batch_size)


def in_batches(
    function: Callable[[list[Any], list[int]], list[Any]], prompts: Sequence[Sequence[int]], batch_size: int
) -> list[Any]:
    """`function(prompts, their numbers)` over batches of prompts of like length; the results in the prompts' order."""
    results: dict[int, Any] = {}
    for numbers in batches(_longest_first(range(len(prompts)), lambda i: len(prompts[i])), batch_size):
        results |= zip(numbers, function([prompts[i] for i in numbers], numbers), strict=True)
    return [results[i] for i in range(len(prompts))]


def batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Runs of `size` items, the last one shorter."""
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def _longest_first(items: Any, length: Callable[[Any], int]) -> list[Any]:
    return sorted(items, key=length, reverse=True)


def _by_beginning(rows: Sequence[Row]) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """Rows that share what stands before their first label, as (its length, the rows), and the rest."""
    groups: dict[tuple[int, bytes], list[int]] = {}
    for i, (input_ids, labels) in enumerate(rows):
        length = int((labels != NO_TARGET).argmax())
        groups.setdefault((length, input_ids[:length].tobytes()), []).append(i)
    shared = [(length, group) for (length, _), group in groups.items() if length >= MIN_SHARED and len(group) > 1]
    together = {i for _, group in shared for i in group}
    return shared, [i for i in range(len(rows)) if i not in together]


def _padded(pieces: list[np.ndarray], filler: int) -> Tensor:
    """Pieces of unequal length as one int64 `[B, T]`, filled up on the right."""
    out = np.full((len(pieces), max(map(len, pieces))), filler, dtype=np.int64)
    for row, piece in enumerate(pieces):
        out[row, : len(piece)] = piece
    return torch.from_numpy(out)


def windows(row: Row, length: int) -> Iterator[Row]:
    """A row cut into rows of at most `length` tokens, each a beginning of its own."""
    for start in range(0, len(row.input_ids), length):
        here = slice(start, start + length)
        yield Row(row.input_ids[here], row.labels[here])
