"""Held-out loss: nats a token, bits a byte, and by position in the context."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch
from data.synthetic import NO_TARGET
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Validation:
    """
    Attributes:
        loss: nats per target token, end-of-document tokens included.
        bits_per_byte: of the documents' own text: end-of-document tokens excluded; None without a tokenizer.
        tokens: targets seen.
        loss_by_position: (first, last + 1, mean nats) over targets whose input token stands between first and last.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    loss_by_position: tuple[tuple[int, int, float], ...]

    def as_metrics(self) -> dict[str, Any]:
        return {
            "val_loss": self.loss,
            "val_bits_per_byte": self.bits_per_byte,
            "val_tokens": self.tokens,
            "val_loss_by_position": [list(entry) for entry in self.loss_by_position],
        }


def position_buckets(sequence_length: int) -> list[int]:
    """Borders 0, 1, 2, 4, 8, ... up to the sequence length."""
    borders = [0, *(2**i for i in range(sequence_length.bit_length()) if 2**i < sequence_length)]
    return [*borders, sequence_length]


def validate(
    token_losses: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    sequence_length: int,
    tokenizer: Tokenizer | None,
    all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Validation:
    """
    Args:
        token_losses: a batch's nll `[B, T]` in nats, 0 where there is no target.
        batches: this rank's share of the held-out rows.
        tokenizer: whose byte counts turn nats into bits per byte.
        all_reduce: sums a float64 vector over the data-parallel ranks.
    """
    borders = position_buckets(sequence_length)
    inner = torch.tensor(borders[1:-1])
    buckets = len(borders) - 1
    token_bytes = torch.from_numpy(tokenizer.token_bytes) if tokenizer is not None else None
    text_nll, text_bytes = 0.0, 0.0
    sums = torch.zeros(2, buckets, dtype=torch.float64)  # nll and count
    for batch in batches:
        nll = token_losses(batch).detach().double().cpu()
        labels, positions = batch.labels.cpu(), batch.positions.cpu()
        valid = labels != NO_TARGET
        bucket = torch.bucketize(positions[valid], inner, right=True)
        sums[0].index_add_(0, bucket, nll[valid])
        sums[1].index_add_(0, bucket, torch.ones_like(nll[valid]))
        if tokenizer is not None and token_bytes is not None:
            text = valid & (labels != tokenizer.eos_id)
            text_nll += nll[text].sum().item()
            text_bytes += token_bytes[labels[text]].sum().item()
    total = all_reduce(torch.cat([sums.flatten(), torch.tensor([text_nll, text_bytes], dtype=torch.float64)]))
    nll_by_bucket, count_by_bucket = total[:-2].view(2, buckets)
    text_nll, text_bytes = total[-2:].tolist()
    by_position = tuple(
        (borders[i], borders[i + 1], (nll_by_bucket[i] / count_by_bucket[i]).item())
        for i in range(buckets)
        if count_by_bucket[i] > 0
    )
    tokens = int(count_by_bucket.sum().item())
    if tokens == 0:
        raise ValueError(
            "validation: the held-out rows have no target token; prepare the corpus with a larger --valid-fraction"
        )
    return Validation(
        loss=nll_by_bucket.sum().item() / tokens,
        bits_per_byte=text_nll / math.log(2) / text_bytes if text_bytes else None,
        tokens=tokens,
        loss_by_position=by_position,
    )
