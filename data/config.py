"""What a run reads: corpora, their weights and the sequence length."""

import math
from dataclasses import dataclass, field

from data.synthetic import find_task


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One corpus of a blend.

    path: a directory written by `python -m data.prepare`, or the prefix of a Megatron / GPT-NeoX pair
        `PREFIX.bin`, `PREFIX.idx`. A prefix serves training only: it has no held-out split.
    weight: this corpus's share of the samples, relative to the other weights.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: value ''; must name a prepared directory or a .bin/.idx prefix; set it")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"weight: value {self.weight} for {self.path}; must be a positive number; "
                "leave the corpus out to give it no share"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run.

    corpora: the blend; every corpus must have been written with the same tokenizer.
    source: a generated task instead of corpora, `synthetic:NAME` (data/synthetic.py).
    options: settings of the generated task.
    sequence_length: T, the tokens the model sees in a row.
    tokenizer: a SentencePiece model; None takes the one of the prepared corpora.
    validation: held-out data, prepared directories (their held-out split) or .bin/.idx prefixes (the whole of
        it); None takes the held-out split of every corpus.
    seed: chooses the order of the samples.
    prefetch: optimizer steps read ahead by a thread; 0 reads in the caller's own.
    """

    corpora: tuple[CorpusConfig, ...] = ()
    source: str | None = None
    options: dict[str, int] = field(default_factory=dict)
    sequence_length: int
    tokenizer: str | None = None
    validation: tuple[str, ...] | None = None
    seed: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        if self.source is not None:
            self._check_source(self.source)
        elif not self.corpora:
            raise ValueError("corpora: value (); must hold at least one corpus; add one with its path")
        elif self.options:
            raise ValueError(f"options: {self.options}; corpora have none; remove it, or set source to a task")
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length: value {self.sequence_length}; must be at least 1; raise it")
        if self.validation is not None and not self.validation:
            raise ValueError("validation: value (); must name at least one path; leave the key out for the default")
        if self.seed < 0:
            raise ValueError(f"seed: value {self.seed}; must not be negative; choose 0 or above")
        if self.prefetch < 0:
            raise ValueError(f"prefetch: value {self.prefetch}; must not be negative; 0 reads without a thread")

    def _check_source(self, source: str) -> None:
        find_task(source, self.options)
        for key in ("corpora", "tokenizer", "validation"):
            if getattr(self, key):
                raise ValueError(
                    f"{key}: {getattr(self, key)!r}; source {source} generates its data; remove one of the two"
                )
