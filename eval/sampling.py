"""How the next token is chosen: greedily, or drawn from the distribution after what cuts and bends it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """
    Attributes:
        max_tokens: the most tokens added to a prompt.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: samples among so many of the likeliest tokens; None among all.
        top_p: samples among the fewest tokens that hold this share of what top_k leaves (Holtzman et al., 2020).
        repetition_penalty: divides the positive logits of tokens that the row holds already, prompt included, and
            multiplies the negative ones (Keskar et al., 2019, arXiv 1909.05858, section 4.1); 1 is none.
        seed: of the draws, which take nothing from torch's global generator.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: {self.max_tokens}; must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature}; must not be negative, 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k}; must be at least 1; leave it out to sample among all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p}; must lie in 0 to 1, 0 excluded")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty: {self.repetition_penalty}; must be positive, 1 is none")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}; must not be negative")


def draws(seed: int, rows: Sequence[int], count: int) -> Tensor:
    """`[B, count]` numbers in [0, 1): each row's depend on the seed and the row's number alone."""
    generators = (np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, row])) for row in rows)
    return torch.from_numpy(np.stack([generator.random(count, dtype=np.float64) for generator in generators]))


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits `[B, N]` after the penalty of the tokens that `seen`, bool `[B, N]`, marks."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Tensor, draw: Tensor, sampling: Sampling) -> Tensor:
    """One token a row by inverting the cumulative distribution at `draw`; `[B, N], [B] -> [B]`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled, order = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(scaled[:, : sampling.top_k], dim=-1)
    mass = probabilities.cumsum(dim=-1)
    kept = ((mass - probabilities) < sampling.top_p).sum(dim=-1, keepdim=True)  # before which less than top_p lies
    target = draw.double().unsqueeze(1) * mass.gather(1, kept - 1)
    rank = torch.searchsorted(mass, target, right=True).minimum(kept - 1)
    return order.gather(1, rank).squeeze(1)
