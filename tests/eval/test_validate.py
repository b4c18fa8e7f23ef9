"""Held-out loss against sums written out token by token."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.loader import Batch
from data.synthetic import NO_TARGET
from eval.validate import position_buckets, validate

TOKENIZER = SimpleNamespace(eos_id=2, token_bytes=np.array([0, 0, 0, 1, 4, 2]))


def batch(rows: list[list[int]], labels: list[list[int]], positions: list[list[int]]) -> Batch:
    return Batch(*(torch.tensor(values) for values in (rows, labels, positions)))


BATCHES = [
    batch([[1, 3, 4, 5]], [[3, 4, 5, 2]], [[0, 1, 2, 3]]),
    batch([[5, 2, 1, 3]], [[2, -100, 3, 4]], [[0, 1, 0, 1]]),
]


def losses(b: Batch) -> torch.Tensor:
    return torch.where(b.labels >= 0, 1.0 + 0.25 * b.labels.float() + b.positions, torch.zeros(()))


def test_sums_are_those_of_the_tokens() -> None:
    result = validate(losses, BATCHES, sequence_length=4, tokenizer=TOKENIZER)  # type: ignore[arg-type]
    nll, text_nll, text_bytes = [], 0.0, 0
    for b in BATCHES:
        for label, position in zip(b.labels.flatten().tolist(), b.positions.flatten().tolist()):
            if label < 0:
                continue
            nll.append((position, 1.0 + 0.25 * label + position))
            if label != TOKENIZER.eos_id:
                text_nll += nll[-1][1]
                text_bytes += int(TOKENIZER.token_bytes[label])
    assert result.tokens == len(nll) == 7
    assert result.loss == pytest.approx(sum(x for _, x in nll) / 7)
    assert result.bits_per_byte == pytest.approx(text_nll / text_bytes / math.log(2))
    for first, end, mean in result.loss_by_position:
        values = [x for position, x in nll if first <= position < end]
        assert mean == pytest.approx(sum(values) / len(values))


def test_ranks_add_up() -> None:
    """Two ranks' sums, added, are the sums of one rank that reads everything."""
    whole = validate(losses, BATCHES, sequence_length=4, tokenizer=TOKENIZER)  # type: ignore[arg-type]
    sent: list[torch.Tensor] = []
    for b in BATCHES:
        validate(losses, [b], sequence_length=4, tokenizer=TOKENIZER, all_reduce=lambda t: sent.append(t) or t)  # type: ignore
    combined = validate(
        losses,
        BATCHES[:1],
        sequence_length=4,
        tokenizer=TOKENIZER,  # type: ignore[arg-type]
        all_reduce=lambda _: sent[0] + sent[1],
    )
    assert combined == whole


def test_without_a_tokenizer_there_are_no_bytes() -> None:
    assert validate(losses, BATCHES, sequence_length=4, tokenizer=None).bits_per_byte is None


def test_no_target_is_an_error() -> None:
    empty = batch([[1, 2]], [[-100, -100]], [[0, 0]])
    with pytest.raises(ValueError, match="no target token"):
        validate(losses, [empty], sequence_length=2, tokenizer=None)


def test_only_the_loaders_mark_is_no_target() -> None:
    """A damaged label counts, and is not taken for the absence of one."""
    marked = batch([[1, 2, 3]], [[4, NO_TARGET, -1]], [[0, 1, 2]])
    result = validate(lambda b: torch.ones(b.labels.shape), [marked], sequence_length=3, tokenizer=None)
    assert result.tokens == 2


@pytest.mark.parametrize(
    ("length", "borders"), [(1, [0, 1]), (4, [0, 1, 2, 4]), (100, [0, 1, 2, 4, 8, 16, 32, 64, 100])]
)
def test_buckets_double(length: int, borders: list[int]) -> None:
    assert position_buckets(length) == borders
