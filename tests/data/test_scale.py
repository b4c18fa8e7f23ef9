"""A corpus of 10^12 tokens in 10^9 documents costs a start, a resume and a step what a small one costs, but for the
logarithm of its documents: files are sparse, but real. Work is counted, and memory read from the process's own maps.
"""

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import data.indexed
from benchmarks.loader import write_corpus
from data.config import CorpusConfig, DataConfig
from data.corpus import SWEPT, check_data
from data.indexed import CHUNK, HEADER, MAGIC, VERSION, IndexedDataset, StoredArray, _sweep
from data.loader import Batch, Loader, Rows, open_rows
from data.order import Blend, Permutation

TRILLION, BILLION = 10**12, 10**9
LENGTH = 2048
LONGEST = 2**31 - 1
"""Tokens of a document: as many as the format permits."""

STEPS, BATCH, RANKS = 2, 8, 2
ROWS = STEPS * BATCH // RANKS

Work = Counter[str]


def sparse(prefix: Path, num_tokens: int, documents: int) -> str:
    """A pair of zeros. All documents are empty but the last ones, so that almost all of the index is zeros too."""
    lengths = np.full(-(-num_tokens // LONGEST), LONGEST, dtype=np.int64)
    lengths[-1] = num_tokens - lengths[:-1].sum()
    empty, pointers = documents - len(lengths), HEADER.size + 4 * documents
    parts = (
        (0, HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1)),
        (HEADER.size + 4 * empty, lengths.astype(np.int32).tobytes()),
        (pointers + 8 * empty, (2 * (np.cumsum(lengths) - lengths)).tobytes()),
        (pointers + 8 * documents + 8 * empty, np.arange(empty, documents + 1, dtype=np.int64).tobytes()),
    )
    try:
        with open(f"{prefix}.bin", "wb") as file:
            file.truncate(2 * num_tokens)
        with open(f"{prefix}.idx", "wb") as file:
            for offset, content in parts:
                file.seek(offset)
                file.write(content)
    except OSError as error:
        pytest.skip(f"this file system holds no sparse file of {2 * num_tokens:,} bytes ({error.strerror})")
    return str(prefix)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A million tokens; as many documents as one chunk of a sweep holds, and some."""
    return sparse(tmp_path_factory.mktemp("small") / "small", 10**6, CHUNK + 5)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sparse(tmp_path_factory.mktemp("large") / "large", TRILLION, BILLION)


@contextmanager
def counted() -> Iterator[Work]:
    """Counts rows and tokens read, samples located, places permuted, documents sought, and entries read of files; ends
    what goes through the samples consumed, which may take hours."""
    work: Work = Counter()
    with pytest.MonkeyPatch.context() as patch:

        def count(where: Any, name: str, key: str, size: Callable[..., int] = lambda *_: 1) -> None:
            inner = getattr(where, name)

            def outer(*arguments: Any) -> Any:
                work[key] += size(*arguments)
                assert work["rows"] + work["located"] < 100 * ROWS, f"{work}: it goes through what was consumed"
                return inner(*arguments)

            patch.setattr(where, name, outer)

        count(Rows, "__getitem__", "rows")
        count(IndexedDataset, "tokens", "tokens", lambda dataset, start, stop: min(stop, dataset.num_tokens) - start)
        count(IndexedDataset, "_start", "looked up")
        count(StoredArray, "__getitem__", "read", lambda array, where: len(range(*where.indices(len(array)))))
        count(Blend, "locate", "located")
        count(Permutation, "__call__", "permuted", lambda _, indices: len(indices))
        yield work


def config_of(*paths: str) -> DataConfig:
    corpora = tuple(CorpusConfig(path=path, weight=1.0 + i) for i, path in enumerate(paths))
    return DataConfig(corpora=corpora, sequence_length=LENGTH, prefetch=0)


def open_loader(config: DataConfig) -> Loader:
    return Loader(config, split="train", batch_size=BATCH, micro_batch_size=2, dp_rank=1, dp_size=RANKS, vocab_size=512)


def first_steps(config: DataConfig, consumed: int) -> list[list[Batch]]:
    return list(islice(open_loader(config).batches(consumed), STEPS))


def test_a_start_and_its_steps_do_the_work_of_a_small_corpus(small: str, large: str) -> None:
    found = []
    for path in (small, large):
        with counted() as work:
            check_data(config_of(path), vocab_size=512, validation=False)
            first_steps(config_of(path), 0)
        found.append(work)
    of_small, of_large = found
    assert of_small["rows"] == of_small["located"] == of_small["permuted"] == ROWS
    for key in ("rows", "located", "permuted"):
        assert of_large[key] == of_small[key], key
    # The start looks at a million tokens, of which the small one has but that.
    assert of_small["tokens"] == of_large["tokens"] - (2**20 - 10**6) == 10**6 + ROWS * (LENGTH + 1)
    assert of_small["looked up"] >= ROWS
    # A row's two ends are sought by halving: 1000 times the documents are ten more looks at each.
    halvings = BILLION.bit_length() - CHUNK.bit_length()
    assert of_large["looked up"] <= of_small["looked up"] + ROWS * 2 * (halvings + 2)
    assert of_small["read"] > of_small["tokens"] + 3 * CHUNK, "a small index is looked at whole"
    chunks = SWEPT // CHUNK
    of_sweep = 3 * SWEPT + 4 * chunks  # at equal distances
    assert of_large["read"] <= of_large["tokens"] + of_sweep + 2 * of_large["looked up"] + 8 * ROWS


def test_ranks_that_do_not_sweep_look_at_a_few_entries(large: str) -> None:
    with counted() as work:
        check_data(config_of(large), vocab_size=512, validation=False, sweep=False)
        open_loader(config_of(large))
    assert work["looked up"] == work["rows"] == 0
    assert work["read"] == 2**20 + 4, "the first tokens, and each time it is opened where the last sequence ends"


@pytest.mark.parametrize("consumed", [BATCH, 5000 * BATCH, 10**7 * BATCH])
def test_a_resume_does_the_work_of_a_start(small: str, large: str, consumed: int) -> None:
    """Samples consumed are neither read nor counted through: of 10^6 tokens they are epochs, and of two corpora."""
    for paths in ((small,), (large,), (small, large)):
        works = []
        for samples in (0, consumed):
            with counted() as work:
                loader = open_loader(config_of(*paths))
                assert work == {"read": 2 * len(paths)}, "where the last sequence ends, and nothing more"
                next(loader.batches(samples))
            works.append(work)
        start, resume = works
        assert start["rows"] == ROWS // STEPS
        looked_up = resume.pop("looked up")
        assert looked_up <= ROWS // STEPS * 2 * (BILLION.bit_length() + 1), "two halvings a row"
        assert resume.pop("read") <= resume["tokens"] + 2 * looked_up + 8 * ROWS
        del start["looked up"], start["read"]
        assert resume == start, (paths, consumed)


def test_a_resume_gives_the_samples_that_come_next(small: str, tmp_path: Path) -> None:
    with data.indexed.IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        for document in range(400):
            writer.add([token % 500 + document % 10 for token in range(1000)])
    config = config_of(str(tmp_path / "pair"))
    whole, resumed = first_steps(config, 0), first_steps(config, BATCH)
    for ours, theirs in zip(whole[1], resumed[0], strict=True):
        assert (ours.input_ids == theirs.input_ids).all()
        assert (ours.positions == theirs.positions).all()


def traced(config: DataConfig, consumed: int) -> float:
    """The most MB of Python's and numpy's own at once, from the check to the last step."""
    tracemalloc.start()
    try:
        with counted():
            check_data(config, vocab_size=512, validation=False)
            first_steps(config, consumed)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_corpus(small: str, large: str) -> None:
    assert (IndexedDataset(large).num_tokens, len(IndexedDataset(large))) == (TRILLION, BILLION)
    traced(config_of(small), 0)  # what is imported and cached on first use
    of_small = traced(config_of(small), 0)
    assert traced(config_of(large), 0) < 1.1 * of_small
    assert traced(config_of(small, large), 10**7 * BATCH) < 1.2 * of_small


def test_pages_of_a_large_index_do_not_stay(large: str) -> None:
    """Of 20 GB: a map would show as resident memory of the process what it touched, and what was read ahead."""
    process = psutil.Process()
    before = process.memory_info().rss
    check_data(config_of(large), vocab_size=512, validation=False)
    loader = open_loader(config_of(large))
    list(islice(loader.batches(0), 20))
    assert process.memory_info().rss - before < 64e6
    assert not [one.path for one in process.memory_maps() if one.path.startswith(large)]


def test_any_row_of_a_trillion_tokens_is_reached(tmp_path: Path) -> None:
    """The last epoch's end and the tokens beyond 2^32 are addressed as they should be."""
    large = sparse(tmp_path / "large", TRILLION, 500)
    rows = (TRILLION - 1) // LENGTH
    marked = rows - 3
    with open(f"{large}.bin", "r+b") as file:
        file.seek(2 * marked * LENGTH)
        file.write(np.full(LENGTH, 7, dtype=np.uint16).tobytes())
    config = config_of(large)
    places = open_loader(config).locate(range(10**8, 10**8 + 64))
    assert len({row for _, row in places}) == 64
    assert max(row for _, row in places) > 2**32 // LENGTH
    (all_rows,) = open_rows(config, "train", 512)
    input_ids, _, positions = all_rows[marked]
    assert (input_ids == 7).all()
    assert positions.tolist() == list(range(positions[0], positions[0] + LENGTH))
    assert (all_rows[marked - 1][0] == 0).all()


def test_the_benchmark_s_corpus_is_whole(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 10_000)
    dataset = IndexedDataset(tmp_path / "corpus")
    dataset.verify()
    assert [len(dataset[document]) for document in range(len(dataset))] == [1000] * 10


def test_a_bounded_sweep_is_spread_over_the_whole() -> None:
    count = 1000 * CHUNK + 5
    assert list(_sweep(count, None)) == list(range(0, count, CHUNK))
    spread = _sweep(count, 10 * CHUNK)
    assert len(spread) == 10
    assert spread[-1] > 0.85 * count
    assert list(_sweep(5, 1)) == [0]
    assert list(_sweep(0, None)) == []
