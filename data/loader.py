"""Token files to microbatches, in an order that is a pure function of (seed, stage, sample number).

A corpus of N tokens is cut into rows of T + 1 tokens, stride T: row i holds tokens i T to i T + T, of which the
first T are inputs and the last T are labels, so that every token is a label once an epoch except the first of
each document, which nothing before it predicts. The last row is filled up with padding that has no labels.

Sample s of a stage is dealt to a corpus by `Blend`; its number there is (epoch, place), and the row is the image of
the place under the `Permutation` keyed by (seed, stage, corpus, epoch). Resuming needs s alone, on any number of ranks.
"""

import itertools
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch

from data.config import DataConfig
from data.corpus import Corpus, check_ids, open_train, open_valid
from data.indexed import IndexedDataset
from data.order import Blend, Permutation
from data.prefetch import prefetch
from data.skipped import Ranges, kept_sample
from data.synthetic import NO_TARGET, SyntheticRows


class Batch(NamedTuple):
    """One microbatch, each int64 [B, T]; labels are already shifted and -100 where there is no target."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class Rows:
    """The rows of one corpus; `vocab_size` bounds the ids, None where it is not known."""

    def __init__(self, corpus: Corpus, sequence_length: int, vocab_size: int | None) -> None:
        self._path = corpus.path
        self._dataset: IndexedDataset = corpus.dataset
        self._length = sequence_length
        self._vocab_size = vocab_size if corpus.vocab_size is None else corpus.vocab_size

    def __len__(self) -> int:
        return _round_up(self._dataset.num_tokens - 1, self._length) // self._length

    def __getitem__(self, row: int) -> np.ndarray:
        """Input ids, labels and positions of a row, int64 [3, T]; raises ValueError for ids outside the vocabulary."""
        start = row * self._length
        tokens = self._dataset.tokens(start, start + self._length + 1).astype(np.int64)  # [<= T + 1]
        check_ids(self._path, tokens, self._vocab_size)
        starts = self._dataset.document_starts(start + 1, start + len(tokens)) - start
        inputs = len(tokens) - 1
        result = np.zeros((3, self._length), dtype=np.int64)
        input_ids, labels, positions = result
        input_ids[:inputs] = tokens[:-1]
        labels[:inputs] = tokens[1:]
        labels[inputs:] = NO_TARGET
        labels[starts - 1] = NO_TARGET
        origins = np.zeros(self._length + 1, dtype=np.int64)
        origins[starts] = starts
        origins[inputs] = inputs  # the padding, if there is any, is a document of its own
        positions[:] = (np.arange(self._length + 1) - np.maximum.accumulate(origins))[:-1]
        return result


def open_rows(
    config: DataConfig, split: Literal["train", "valid"], vocab_size: int | None
) -> list[Rows] | list[SyntheticRows]:
    """The rows of each corpus, or of the generated task."""
    if config.source is None:
        corpora = open_train(config) if split == "train" else open_valid(config)
        return [Rows(corpus, config.sequence_length, vocab_size) for corpus in corpora]
    assert vocab_size is not None, "a generated task fills the model's vocabulary"
    length, seed = config.sequence_length, config.seed
    task = SyntheticRows(
        config.source, config.options, split=split, seed=seed, sequence_length=length, vocab_size=vocab_size
    )
    return [task]


class Loader:
    """One rank's share of a stage's samples.

    batch_size: sequences of an optimizer step over all ranks. micro_batch_size: B, the rows of one Batch.
    vocab_size: bound on the ids of foreign corpora; prepared ones know theirs.
    The step after c consumed samples: microbatch m of rank r holds those that come after
    c + (m dp_size + r) micro_batch_size + 0 … micro_batch_size - 1 samples that are not skipped.
    Raises ValueError if the batch does not divide or a corpus cannot be used.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Literal["train", "valid"],
        batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        stage: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        check_batch(batch_size, micro_batch_size, dp_size)
        self._rows = open_rows(config, split, vocab_size)
        weighted = config.source is None and (split == "train" or config.validation is None)
        self._blend = Blend([corpus.weight for corpus in config.corpora] if weighted else [1.0] * len(self._rows))
        self._key = (config.seed, stage)
        self._prefetch = config.prefetch
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each corpus: what the order of samples depends on besides the configuration."""
        return tuple(len(rows) for rows in self._rows)

    def batches(self, consumed_samples: int, skipped: Ranges = ()) -> Generator[list[Batch], None, None]:
        """This rank's microbatches of each optimizer step after `consumed_samples`, without end; none of `skipped`.

        Read ahead by a thread, which closing the iterator stops; errors of the thread are raised here.
        """
        if consumed_samples < 0:
            raise ValueError(
                f"consumed_samples: value {consumed_samples}; must not be negative; resume from 0 or later"
            )
        steps = (self._step(consumed, skipped) for consumed in itertools.count(consumed_samples, self._batch_size))
        return prefetch(steps, self._prefetch) if self._prefetch else steps

    def samples(self, consumed_samples: int, skipped: Ranges = ()) -> tuple[int, int]:
        """The first and the last sample of the step after `consumed_samples`, over all ranks."""
        last = consumed_samples + self._batch_size - 1
        return kept_sample(consumed_samples, skipped), kept_sample(last, skipped)

    def _step(self, consumed: int, skipped: Ranges) -> list[Batch]:
        start = consumed + self._dp_rank * self._micro_batch_size
        stop = consumed + self._batch_size
        return [
            self._microbatch([kept_sample(count, skipped) for count in range(first, first + self._micro_batch_size)])
            for first in range(start, stop, self._dp_size * self._micro_batch_size)
        ]

    def _microbatch(self, samples: list[int]) -> Batch:
        return _batch([self._rows[corpus][row] for corpus, row in self.locate(samples)])

    def locate(self, samples: Iterable[int]) -> list[tuple[int, int]]:
        """(corpus, row) of each sample number of the stage."""
        dealt = [self._blend.locate(sample) for sample in samples]
        places = [(corpus, *divmod(number, len(self._rows[corpus]))) for corpus, number in dealt]
        located = [(0, 0)] * len(places)
        for epoch in {place[:2] for place in places}:
            members = [index for index, place in enumerate(places) if place[:2] == epoch]
            permutation = Permutation(len(self._rows[epoch[0]]), *self._key, *epoch)
            images = permutation(np.array([places[index][2] for index in members]))
            for index, image in zip(members, images):
                located[index] = (epoch[0], int(image))
        return located


def validation_batches(
    config: DataConfig,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    max_sequences: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """The held-out rows once, in order: batch k of rank r holds rows (k dp_size + r) micro_batch_size onwards.

    Every rank gets the same number of batches, filled up with rows that have no labels. With `max_sequences`, as many
    rows at equal distances over the whole. Raises ValueError if there is no held-out text.
    """
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"max_sequences: value {max_sequences}; must be at least 1; leave it out to read all")
    sources = open_rows(config, "valid", vocab_size)
    ends = list(itertools.accumulate(len(source) for source in sources))
    count = min(ends[-1], max_sequences or ends[-1])

    def row(number: int) -> np.ndarray:
        if number >= count:
            return _no_targets(config.sequence_length)
        place = number * ends[-1] // count
        source = bisect_right(ends, place)
        return sources[source][len(sources[source]) - ends[source] + place]

    starts = range(dp_rank * micro_batch_size, _round_up(count, dp_size * micro_batch_size), dp_size * micro_batch_size)
    return (_batch([row(number) for number in range(start, start + micro_batch_size)]) for start in starts)


def check_batch(batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Raises ValueError unless the batch is a whole number of microbatches on every rank."""
    unit = micro_batch_size * dp_size
    if micro_batch_size < 1:
        raise ValueError(f"train.micro_batch_size: value {micro_batch_size}; must be at least 1; raise it")
    if batch_size < 1 or batch_size % unit:
        below, above = batch_size // unit * unit, _round_up(max(batch_size, 1), unit)
        nearest = " or ".join(str(size) for size in (below, above) if size > 0)
        raise ValueError(
            f"train.batch_size: value {batch_size}; must be a multiple of train.micro_batch_size ({micro_batch_size}) "
            f"times the data-parallel ranks ({dp_size}); set it to {nearest}"
        )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _no_targets(length: int) -> np.ndarray:
    return np.stack([np.zeros(length, np.int64), np.full(length, NO_TARGET), np.arange(length)])


def _batch(rows: list[np.ndarray]) -> Batch:
    """Stacks rows [3, T] to a batch of [B, T] each."""
    return Batch(*(torch.from_numpy(np.stack(field)) for field in zip(*rows)))
