"""What a corpus of N tokens costs a run's start and its steps: `python -m benchmarks.loader`.

The corpora are sparse files: the loader maps and addresses them as any other, and the disk keeps nothing.
"""

import argparse
import tempfile
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np

from data.config import CorpusConfig, DataConfig
from data.corpus import check_data
from data.indexed import HEADER, MAGIC, VERSION
from data.loader import Loader

DOCUMENT = 2**31 - 1
"""Tokens of a document: as many as the format permits, so that the index is small too."""

REPEATS = 5


def write_sparse(prefix: Path, num_tokens: int) -> None:
    """A pair of uint16 zeros."""
    lengths = np.full(-(-num_tokens // DOCUMENT), DOCUMENT, dtype=np.int64)
    lengths[-1] = num_tokens - lengths[:-1].sum()
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * num_tokens)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, len(lengths), len(lengths) + 1))
        file.write(lengths.astype(np.int32).tobytes() + (2 * (np.cumsum(lengths) - lengths)).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def start_and_step(prefix: Path, consumed: int) -> tuple[float, float, float]:
    """Seconds from the check to the first step's rows after `consumed` samples, seconds of a later step's, peak MB."""
    config = DataConfig(corpora=(CorpusConfig(path=str(prefix)),), sequence_length=4096, prefetch=0)
    tracemalloc.start()
    begin = time.perf_counter()
    check_data(config, vocab_size=512, validation=False)
    loader = Loader(config, split="train", batch_size=64, micro_batch_size=8, dp_rank=0, dp_size=8, vocab_size=512)
    batches = loader.batches(consumed)
    next(batches)
    started = time.perf_counter()
    list(islice(batches, 20))
    stepped = time.perf_counter()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return started - begin, (stepped - started) / 20, peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("tokens    consumed samples    start, ms    a step's 8 rows of 4096, ms    peak memory, MB")
    with tempfile.TemporaryDirectory() as directory:
        sizes = [10**exponent for exponent in (7, 9, 12)]
        for size in sizes:
            write_sparse(Path(directory) / str(size), size)
        cases = [(size, consumed) for size in sizes for consumed in (0, 64 * 10**6)]
        figures: dict[tuple[int, int], list[tuple[float, float, float]]] = {case: [] for case in cases}
        for _ in range(REPEATS):
            for size, consumed in cases:
                figures[size, consumed].append(start_and_step(Path(directory) / str(size), consumed))
        for (size, consumed), found in figures.items():
            start, step, peak = (median(column) for column in zip(*found, strict=True))
            print(f"{size:>6.0e}    {consumed:>16,}    {1e3 * start:>9.1f}    {1e3 * step:>27.1f}    {peak:>15.1f}")


if __name__ == "__main__":
    main()
