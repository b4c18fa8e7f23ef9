"""A corpus of 10^12 tokens costs a start, a resume and a step what one of 10^6 costs: files are sparse, but real."""

import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import write_sparse
from data.config import CorpusConfig, DataConfig
from data.corpus import check_data
from data.indexed import CHUNK, IndexedDataset, IndexedWriter, _sweep
from data.loader import Batch, Loader, open_rows

TRILLION = 10**12
LENGTH = 2048


def sparse(prefix: Path, num_tokens: int) -> str:
    try:
        write_sparse(prefix, num_tokens)
    except OSError as error:
        pytest.skip(f"this file system holds no sparse file of {2 * num_tokens:,} bytes ({error.strerror})")
    return str(prefix)


def first_batches(paths: list[str], consumed: int) -> tuple[list[list[Batch]], int]:
    """Two steps after `consumed` samples, from opening on, and the most memory that took."""
    corpora = tuple(CorpusConfig(path=path, weight=1.0 + i) for i, path in enumerate(paths))
    config = DataConfig(corpora=corpora, sequence_length=LENGTH, prefetch=0)
    tracemalloc.start()
    check_data(config, vocab_size=512, validation=False)
    loader = Loader(config, split="train", batch_size=8, micro_batch_size=2, dp_rank=1, dp_size=2, vocab_size=512)
    steps = list(islice(loader.batches(consumed), 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return steps, peak


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    small = sparse(tmp_path / "small", 4 * 10**6)
    large = sparse(tmp_path / "large", TRILLION)
    assert IndexedDataset(large).num_tokens == TRILLION
    first_batches([small], 0)  # what is imported and cached on first use
    _, of_small = first_batches([small], 0)
    _, of_large = first_batches([large], 0)
    _, of_both_late = first_batches([small, large], 8 * 10**7)
    assert of_large < 1.1 * of_small, (of_large, of_small)
    assert of_both_late < 1.2 * of_small, (of_both_late, of_small)


def test_any_row_of_a_trillion_tokens_is_reached(tmp_path: Path) -> None:
    """The last epoch's end and the tokens beyond 2^32 are addressed as they should be."""
    large = sparse(tmp_path / "large", TRILLION)
    rows = (TRILLION - 1) // LENGTH
    marked = rows - 3
    with open(f"{large}.bin", "r+b") as file:
        file.seek(2 * marked * LENGTH)
        file.write(np.full(LENGTH, 7, dtype=np.uint16).tobytes())
    config = DataConfig(corpora=(CorpusConfig(path=large),), sequence_length=LENGTH, prefetch=0)
    loader = Loader(config, split="train", batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1, vocab_size=512)
    places = loader.locate(range(10**8, 10**8 + 64))
    assert len({row for _, row in places}) == 64
    assert max(row for _, row in places) > 2**32 // LENGTH
    (all_rows,) = open_rows(config, "train", 512)
    input_ids, _, positions = all_rows[marked]
    assert (input_ids == 7).all()
    assert positions.tolist() == list(range(positions[0], positions[0] + LENGTH))
    assert (all_rows[marked - 1][0] == 0).all()


def test_a_resume_reads_nothing_of_what_was_consumed(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        for document in range(400):
            writer.add([token % 500 + document % 10 for token in range(1000)])
    whole, _ = first_batches([str(tmp_path / "pair")], 0)
    resumed, _ = first_batches([str(tmp_path / "pair")], 8)
    for ours, theirs in zip(whole[1], resumed[0], strict=True):
        assert (ours.input_ids == theirs.input_ids).all()
        assert (ours.positions == theirs.positions).all()


def test_a_bounded_sweep_is_spread_over_the_whole() -> None:
    count = 1000 * CHUNK + 5
    assert list(_sweep(count, None)) == list(range(0, count, CHUNK))
    spread = _sweep(count, 10 * CHUNK)
    assert len(spread) == 10
    assert spread[-1] > 0.85 * count
    assert list(_sweep(5, 1)) == [0]
    assert list(_sweep(0, None)) == []
