"""What a corpus of N tokens costs a run's start, its steps and a resume: `python -m benchmarks.loader`.

The .idx are whole, of documents of 1000 tokens: 20 GB for 10^12 tokens, which a temporary directory (TMPDIR) holds.
The .bin are sparse files of zeros: the loader reads them as any other, and the disk keeps nothing. Each
figure is the median of processes of their own, which find the files out of the page cache.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.heading import heading
from data.config import CorpusConfig, DataConfig
from data.corpus import check_data
from data.indexed import CHUNK, HEADER, MAGIC, VERSION
from data.loader import Loader

DOCUMENT = 1000
ROWS, LENGTH, RANKS = 8, 4096, 8
STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Figures:
    """
    Attributes:
        tokens, documents: of the corpus.
        consumed_samples: that the run resumes after.
        check_ms: opening and checking the corpus, as the lead does.
        first_step_ms: from there to the first step's rows of one rank.
        step_ms, tokens_per_second: of one rank's later steps, ROWS rows of LENGTH tokens each.
        peak_mb: how much more memory the process had resident at its peak than before.
        anonymous_mb: of that, what it still has at the end and could not give back.
    """

    tokens: int
    documents: int
    consumed_samples: int
    check_ms: float
    first_step_ms: float
    step_ms: float
    tokens_per_second: float
    peak_mb: float
    anonymous_mb: float


def write_corpus(prefix: Path, tokens: int) -> None:
    """A pair of uint16 zeros, in documents of DOCUMENT tokens."""
    documents = tokens // DOCUMENT
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * documents * DOCUMENT)
    unfinished = Path(f"{prefix}.idx.unfinished")
    with unfinished.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        for start in range(0, documents, CHUNK):
            file.write(np.full(min(CHUNK, documents - start), DOCUMENT, dtype=np.int32).tobytes())
        for stop, step in ((documents, 2 * DOCUMENT), (documents + 1, 1)):
            for start in range(0, stop, CHUNK):
                file.write((step * np.arange(start, min(start + CHUNK, stop), dtype=np.int64)).tobytes())
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(f"{prefix}.idx")


def measure(prefix: Path, tokens: int, consumed: int) -> Figures:
    """In this process, which should have done nothing else."""
    for suffix in (".bin", ".idx"):
        with open(f"{prefix}{suffix}", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory()
    config = DataConfig(corpora=(CorpusConfig(path=str(prefix)),), sequence_length=LENGTH, prefetch=0)
    batch = ROWS * RANKS
    begun = time.perf_counter()
    check_data(config, vocab_size=512, validation=False)
    checked = time.perf_counter()
    loader = Loader(
        config, split="train", batch_size=batch, micro_batch_size=ROWS, dp_rank=0, dp_size=RANKS, vocab_size=512
    )
    batches = loader.batches(consumed)
    next(batches)
    started = time.perf_counter()
    for _ in islice(batches, STEPS):
        pass
    step = (time.perf_counter() - started) / STEPS
    after = memory()
    return Figures(
        tokens=tokens,
        documents=tokens // DOCUMENT,
        consumed_samples=consumed,
        check_ms=1e3 * (checked - begun),
        first_step_ms=1e3 * (started - checked),
        step_ms=1e3 * step,
        tokens_per_second=ROWS * LENGTH / step,
        peak_mb=after["VmHWM"] - before["VmRSS"],
        anonymous_mb=after["RssAnon"] - before["RssAnon"],
    )


def memory() -> dict[str, float]:
    """MB by kind, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    entries = [line.partition(":")[::2] for line in lines]
    return {key: int(value.split()[0]) / 1e3 for key, value in entries if value.endswith("kB")}


def summarise(found: Sequence[Figures]) -> Figures:
    """The median of each figure."""
    columns = {key: [getattr(one, key) for one in found] for key in asdict(found[0])}
    return Figures(**{key: median(values) for key, values in columns.items()})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10**6, 10**9, 10**12], metavar="N", help="of corpora")
    parser.add_argument("--resume", type=int, default=10**8, metavar="SAMPLES", help="consumed by the resumed run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where corpora are kept, and taken from when they are there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    if min(args.tokens) <= LENGTH or args.rounds < 1 or args.resume < 0:
        parser.error(f"--tokens must be above {LENGTH}, --rounds at least 1, --resume not negative")
    place = tempfile.TemporaryDirectory() if args.directory is None else nullcontext(str(args.directory))
    with place as directory:
        corpora = {tokens: Path(directory) / str(tokens) for tokens in args.tokens}
        for tokens, prefix in corpora.items():
            if not Path(f"{prefix}.idx").exists():
                write_corpus(prefix, tokens)
                print(f"{tokens:,} tokens: written", flush=True)
        cases = [(tokens, consumed) for tokens in args.tokens for consumed in (0, args.resume)]
        found: dict[tuple[int, int], list[Figures]] = {case: [] for case in cases}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
            for _ in range(args.rounds):
                for case in cases:
                    found[case].append(processes.submit(measure, corpora[case[0]], *case).result())
    figures = [summarise(of_case) for of_case in found.values()]
    for one in figures:
        print(describe(one))
    if args.output is not None:
        record = {
            **heading(),
            "settings": {"document": DOCUMENT, "rows": ROWS, "length": LENGTH, "steps": STEPS, "rounds": args.rounds},
            "figures": [asdict(one) for one in figures],
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def describe(one: Figures) -> str:
    return (
        f"{one.tokens:>7.0e} tokens, {one.consumed_samples:>11,} samples consumed: check {one.check_ms:8.1f} ms, "
        f"first step {one.first_step_ms:6.1f} ms, a step {one.step_ms:5.2f} ms "
        f"({one.tokens_per_second / 1e6:.1f}M tokens/s), "
        f"peak {one.peak_mb:6.1f} MB, kept {one.anonymous_mb:5.1f} MB"
    )


if __name__ == "__main__":
    main()
