"""The embedding and the head with the vocabulary cut over tensor ranks: no rank holds or forms a whole row of logits.

A vocabulary that does not divide is filled up with rows of zeros at its end, which no token reads and no logit counts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.lm import LM, Embedding, Head, likeliest
from models.sharding import Cut
from ops.linear_cross_entropy import vocabulary_slice
from parallel.axes import Axis
from parallel.collectives import all_gather, all_reduce, reduce_from
from parallel.regions import Region, enter, leave
from parallel.tensor import mark_cut, part_of


def shard_vocabulary(model: LM, region: Region) -> dict[str, Cut]:
    """Cuts the model's embedding and head in place; returns the cuts by the parameters' names in the model."""
    if region.axis.size == 1:
        return {}
    tied = model.head.weight is model.embed.weight
    cut = cut_vocabulary(model.embed.weight)
    model.embed = SlicedEmbedding(model.embed, region)  # type: ignore[assignment]
    model.head = SlicedHead(model.head, region, model.embed.weight if tied else None)  # type: ignore[assignment]
    return {"embed.weight": cut} if tied else {"embed.weight": cut, "head.weight": cut}


def _rows(vocab_size: int, axis: Axis) -> slice:
    """This rank's rows of a vocabulary filled up to a multiple of the ranks."""
    count = -(-vocab_size // axis.size)
    return slice(axis.index * count, (axis.index + 1) * count)


def _parameter(weight: Tensor, axis: Axis) -> nn.Parameter:
    parameter = nn.Parameter(part_of(weight.detach(), cut_vocabulary(weight), axis))
    mark_cut(parameter, counts=True)
    return parameter


def cut_vocabulary(weight: Tensor) -> Cut:
    """Of a whole `[N, D]`."""
    return Cut(0, (len(weight),), fill=True)


class SlicedEmbedding(nn.Module):
    """Each rank looks up the tokens it has rows for; the sum over ranks is the whole."""

    def __init__(self, embedding: Embedding, region: Region) -> None:
        super().__init__()
        self.scale, self.region = embedding.scale, region
        self.start = _rows(len(embedding.weight), region.axis).start
        self.weight = _parameter(embedding.weight, region.axis)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = input_ids - self.start
        mine = (rows >= 0) & (rows < len(self.weight))
        x = nn.functional.embedding(rows.clamp(0, len(self.weight) - 1), self.weight) * mine.unsqueeze(-1)
        return leave(x, self.region) * self.scale


class SlicedHead(nn.Module):
    """The loss from each rank's logits: three numbers a token travel, its label's logit and the slice's log-sum-exp."""

    def __init__(self, head: Head, region: Region, tied: Tensor | None) -> None:
        super().__init__()
        axis = region.axis
        self.norm, self.impl, self.logit_soft_cap = head.norm, head.impl, head.logit_soft_cap
        self.region, self.axis = region, axis
        rows = _rows(len(head.weight), axis)
        self.start, self.num_entries = rows.start, max(0, min(rows.stop, len(head.weight)) - rows.start)
        self.weight = _parameter(head.weight, axis) if tied is None else tied
        self.judges: int | None = None
        self.vocab_size = len(head.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """As `Head.forward`. The logits are whole on every rank, and have no gradient."""
        if labels is None:
            return self._logits(self.norm(x))
        x = enter(self.norm(x), self.region)
        label_logit, log_sum_exp = vocabulary_slice(
            x,
            self.weight,
            labels,
            start=self.start,
            num_entries=self.num_entries,
            logit_soft_cap=self.logit_soft_cap,
            impl=self.impl,
        )
        log_z = log_sum_exp_over(log_sum_exp, self.axis)
        valid = labels != -100
        nll = torch.where(valid, log_z - reduce_from(label_logit, self.axis), 0)
        if self.judges is not None:
            return nll, self._likeliest(x, self.judges).to(nll.dtype)
        return nll, torch.where(valid, log_z, 0)

    def _logits(self, x: Tensor) -> Tensor:
        logits = nn.functional.linear(x, self.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = torch.cat(all_gather(logits, self.axis).unbind(0), dim=-1)[..., : self.vocab_size]
        if self.logit_soft_cap is None:
            return logits
        return self.logit_soft_cap * torch.tanh(logits / self.logit_soft_cap)

    def _likeliest(self, x: Tensor, count: int) -> Tensor:
        """The most likely of the vocabulary's first `count` entries at each token, the first of several."""
        entry = torch.full(x.shape[:-1], torch.iinfo(torch.int64).max, device=x.device)
        best = x.new_full(x.shape[:-1], -torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
        if mine := max(0, min(self.num_entries, count - self.start)):
            best, entry = likeliest(x, self.weight[:mine])
            entry = entry + self.start
        highest = all_reduce(best, self.axis, dist.ReduceOp.MAX)
        entry = torch.where(best == highest, entry, torch.iinfo(torch.int64).max)
        return all_reduce(entry, self.axis, dist.ReduceOp.MIN)


def log_sum_exp_over(x: Tensor, axis: Axis) -> Tensor:
    """The logarithm of the sum over ranks of exp(x), equal on all; each rank's gradient is its own share of it."""
    peak = all_reduce(x, axis, dist.ReduceOp.MAX)
    total = peak + all_reduce((x.detach() - peak).exp(), axis).log()
    share = (x.detach() - total).exp()
    # x - x.detach() is 0 where x is finite; a rank without entries, at -inf, has no share.
    return total + share * torch.where(share > 0, x - x.detach(), 0)
