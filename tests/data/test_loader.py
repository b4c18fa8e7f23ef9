from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import CorpusConfig, DataConfig
from data.indexed import IndexedDataset, IndexedWriter
from data.loader import Batch, Loader, validation_batches
from data.tokenizer import Tokenizer

T = 16


def write(prefix: Path, documents: list[list[int]]) -> Path:
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def config(*paths: Path, weights: tuple[float, ...] = (), length: int = T, **options) -> DataConfig:
    corpora = tuple(CorpusConfig(path=str(p), weight=w) for p, w in zip(paths, weights or (1.0,) * len(paths)))
    return DataConfig(corpora=corpora, sequence_length=length, **options)


def loader(data: DataConfig, batch_size: int = 12, micro: int = 2, rank: int = 0, ranks: int = 1, **options) -> Loader:
    return Loader(
        data, split="train", batch_size=batch_size, micro_batch_size=micro, dp_rank=rank, dp_size=ranks, **options
    )


def rows_of(batch: Batch) -> list[tuple]:
    return [tuple(map(tuple, row)) for row in torch.stack(list(batch), dim=1).tolist()]


def take(data: DataConfig, steps: int, consumed: int = 0, **options) -> list[list[Batch]]:
    batches = loader(data, **options).batches(consumed)
    taken = list(islice(batches, steps))
    batches.close()  # type: ignore[attr-defined]
    return taken


def plain_rows(documents: list[list[int]], length: int) -> list[tuple]:
    """Inputs, labels and positions of every row, token by token."""
    stream = [(token, place) for document in documents for place, token in enumerate(document)]
    rows = []
    for start in range(0, len(stream) - 1, length):
        row: list[tuple[int, int, int]] = []
        padding_position = 0
        for index in range(start, start + length):
            if index + 1 < len(stream):
                token, place = stream[index]
                following, following_place = stream[index + 1]
                position = 0 if index == start or place == 0 else row[-1][2] + 1
                row.append((token, -100 if following_place == 0 else following, position))
            else:
                row.append((0, -100, padding_position))
                padding_position += 1
        rows.append(tuple(zip(*row)))
    return rows


def random_documents(seed: int, lengths: tuple[int, ...] | None = None) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    drawn = lengths or tuple(generator.geometric(1 / 9, 150).tolist())
    return [generator.integers(1, 500, length).tolist() for length in drawn]


@pytest.mark.parametrize(
    "lengths",
    [None, (1,) * 70, (16, 16, 1, 15, 17, 31, 33), (200,), (15, 1, 16, 16), (3, 14), (17,), (1, 32, 1, 30, 1)],
    ids=[
        "random",
        "single tokens",
        "row borders",
        "one long",
        "whole rows",
        "exactly a row",
        "label only",
        "late starts",
    ],
)
def test_rows_match_a_plain_reading(tmp_path: Path, lengths: tuple[int, ...] | None) -> None:
    documents = random_documents(1, lengths)
    data = config(write(tmp_path / "corpus", documents))
    expected = plain_rows(documents, T)
    (microbatches,) = take(data, 1, batch_size=len(expected), micro=1)
    found = [row for batch in microbatches for row in rows_of(batch)]
    assert sorted(found) == sorted(expected)
    batch = microbatches[0]
    assert [tensor.dtype for tensor in batch] == [torch.int64] * 3
    assert [tuple(tensor.shape) for tensor in batch] == [(1, T)] * 3


def test_every_token_but_a_documents_first_is_a_label_once_an_epoch(tmp_path: Path) -> None:
    documents = random_documents(2)
    data = config(write(tmp_path / "corpus", documents))
    (microbatches,) = take(data, 1, batch_size=len(plain_rows(documents, T)), micro=1)
    labels = Counter(label for batch in microbatches for label in batch.labels.flatten().tolist() if label != -100)
    assert labels == Counter(token for document in documents for token in document[1:])


def test_prepared_documents_begin_with_bos_and_end_with_eos(corpus: Path, tokenizer: Tokenizer) -> None:
    data = config(corpus)
    for batch in islice(loader(data).batches(0), 5):
        for input_ids, labels, positions in zip(batch[0].input_ids, batch[0].labels, batch[0].positions):
            assert torch.equal(positions[1:] == 0, input_ids[1:] == tokenizer.bos_id)
            assert torch.equal(labels == -100, input_ids == tokenizer.eos_id)
            assert not (labels == tokenizer.bos_id).any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_ranks_together_read_what_one_rank_reads(corpus: Path, ranks: int, prefetch: int) -> None:
    data = config(corpus, seed=3, prefetch=prefetch)
    single = take(data, 4, micro=12)
    shares = [
        take(data, 4, micro=12 // ranks // (2 if ranks < 4 else 1), rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    for step in range(4):
        # Microbatch m of rank r holds consecutive samples: reading m by m, rank by rank, restores the order.
        together = [row for m in range(len(shares[0][step])) for share in shares for row in rows_of(share[step][m])]
        assert together == rows_of(single[step][0])


def test_resumes_from_consumed_samples_alone(corpus: Path) -> None:
    data = config(corpus, seed=5)
    straight = take(data, 9)
    resumed = take(data, 4, consumed=5 * 12, micro=3, ranks=2) + take(
        data, 4, consumed=5 * 12, micro=3, ranks=2, rank=1
    )
    for step in range(4):
        expected = Counter(row for batch in straight[5 + step] for row in rows_of(batch))
        found = Counter(
            row for share in (resumed[step], resumed[4 + step]) for batch in share for row in rows_of(batch)
        )
        assert found == expected


def test_each_epoch_reads_everything_in_another_order(corpus: Path) -> None:
    data = config(corpus)
    number = len(plain_rows([document.tolist() for document in IndexedDataset(corpus / "train")], T))
    stream = loader(data)
    epochs = [stream.locate(range(epoch * number, (epoch + 1) * number)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, row) for row in range(number)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    across = stream.locate(range(number - 5, number + 5))
    assert across == epochs[0][-5:] + epochs[1][:5]


def test_seed_and_stage_choose_the_order(corpus: Path) -> None:
    orders = [
        loader(config(corpus, seed=seed), stage=stage).locate(range(40))
        for seed, stage in ((0, 0), (1, 0), (0, 1), (0, 0))
    ]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_blend_draws_by_weight_and_keeps_an_epoch_for_each_corpus(tmp_path: Path, corpus: Path) -> None:
    small = write(tmp_path / "small", random_documents(3, (100,)))
    data = config(small, corpus, weights=(1.0, 3.0))
    located = loader(data).locate(range(400))
    assert Counter(index for index, _ in located) == {0: 100, 1: 300}
    drawn = [row for index, row in located if index == 0]
    for epoch in range(0, len(drawn), 7):  # 100 tokens are 7 rows
        assert sorted(drawn[epoch : epoch + 7]) == list(range(7))[: len(drawn) - epoch] or epoch > 90
    texts = {tuple(IndexedDataset(small).tokens(row * T, row * T + T).tolist()) for row in range(7)}
    (microbatches,) = take(data, 1, batch_size=40, micro=40)
    assert sum(tuple(row) in texts for row in microbatches[0].input_ids.tolist()) in (8, 9)  # the padded row differs


def flatten(batches: Iterator[Batch]) -> list[tuple]:
    return [row for batch in batches for row in rows_of(batch)]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 4), (3, 2), (4, 5)])
def test_validation_reads_the_held_out_rows_once_in_order(corpus: Path, ranks: int, micro: int) -> None:
    data = config(corpus)
    shares = [
        list(validation_batches(data, micro_batch_size=micro, dp_rank=rank, dp_size=ranks)) for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    found = [row for index in range(len(shares[0])) for share in shares for row in rows_of(share[index])]
    expected = plain_rows([document.tolist() for document in IndexedDataset(corpus / "valid")], T)
    assert found[: len(expected)] == expected
    assert len(found) - len(expected) < micro * ranks
    assert all(set(labels) == {-100} for _, labels, _ in found[len(expected) :])


def test_validation_takes_rows_at_equal_distances(corpus: Path) -> None:
    rows = flatten(validation_batches(config(corpus), micro_batch_size=1, dp_rank=0, dp_size=1))
    some = flatten(validation_batches(config(corpus), micro_batch_size=1, dp_rank=0, dp_size=1, max_sequences=10))
    assert some == [rows[index * len(rows) // 10] for index in range(10)]
    everything = flatten(
        validation_batches(config(corpus), micro_batch_size=1, dp_rank=0, dp_size=1, max_sequences=10**9)
    )
    assert everything == rows


def test_validation_of_several_corpora_and_of_named_data(tmp_path: Path, corpus: Path) -> None:
    pair = write(tmp_path / "pair", random_documents(4))
    valid = plain_rows([document.tolist() for document in IndexedDataset(corpus / "valid")], T)
    both = config(corpus, pair, validation=(str(pair), str(corpus)))
    found = flatten(validation_batches(both, micro_batch_size=1, dp_rank=0, dp_size=1))
    assert found == plain_rows(random_documents(4), T) + valid
    twice = flatten(validation_batches(config(corpus, corpus), micro_batch_size=1, dp_rank=0, dp_size=1))
    assert twice == valid + valid


def test_a_loader_of_the_held_out_split(corpus: Path) -> None:
    stream = Loader(config(corpus), split="valid", batch_size=2, micro_batch_size=2, dp_rank=0, dp_size=1)
    expected = set(plain_rows([document.tolist() for document in IndexedDataset(corpus / "valid")], T))
    batches = stream.batches(0)
    assert {row for (batch,) in islice(batches, 5) for row in rows_of(batch)} <= expected


@pytest.mark.parametrize(("batch_size", "micro", "ranks"), [(10, 4, 1), (12, 4, 2), (3, 4, 1), (0, 4, 1)])
def test_refuses_a_batch_that_does_not_divide(corpus: Path, batch_size: int, micro: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=rf"batch_size: value {batch_size}; must be a multiple of .* set it to \d+"):
        loader(config(corpus), batch_size=batch_size, micro=micro, ranks=ranks)


def test_refuses_other_bad_numbers(corpus: Path) -> None:
    with pytest.raises(ValueError, match="micro_batch_size: value 0"):
        loader(config(corpus), micro=0)
    with pytest.raises(ValueError, match="consumed_samples: value -1"):
        loader(config(corpus)).batches(-1)
    with pytest.raises(ValueError, match="max_sequences: value 0"):
        validation_batches(config(corpus), micro_batch_size=1, dp_rank=0, dp_size=1, max_sequences=0)


def test_ids_outside_the_vocabulary_reach_the_consumer_as_an_error(tmp_path: Path) -> None:
    pair = write(tmp_path / "pair", [*random_documents(5), [501] * 20])
    batches = loader(config(pair), vocab_size=500).batches(0)
    with pytest.raises(ValueError, match=r"pair: holds the token id 501; .* vocabulary of 500"):
        list(islice(batches, 100))
