"""Text to a corpus of tokens: `python -m data.prepare`.

The sources are cut into parts, worker processes turn parts into tokens, and the parts are merged in order: the corpus
depends on the sources and settings only, not on the number of workers nor on how often the command was killed and run
again. `DIR/.parts` holds what is not finished.
"""

import argparse
import dataclasses
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data.merge import merge_parts
from data.parts import Settings, cut_into_parts, encode_part, is_held_out, part_directory, usable_documents
from data.plan import claim, finished
from data.publish import publish
from data.sources import Source, find_sources
from data.tokenizer import Tokenizer, train_tokenizer
from data.workers import run_tasks

WORK = ".parts"
SAMPLE_BYTES = 64 << 20  # BPE learns from as much in about half a minute


@dataclass(frozen=True)
class Training:
    """A tokenizer to be trained on up to `sample_bytes` of the training documents' text."""

    vocab_size: int
    kind: Literal["bpe", "unigram"]
    sample_bytes: int = SAMPLE_BYTES


@dataclass(frozen=True)
class EncodePart:
    """The workers' task."""

    work: Path
    parts: list[list[Source]]
    settings: Settings

    def __call__(self, index: int) -> Iterator[int]:
        return encode_part(
            self.parts[index], part_directory(self.work, index), self.work / "tokenizer.model", self.settings
        )


def prepare(
    inputs: Sequence[str],
    tokenizer: Path | Training,
    output: Path,
    settings: Settings,
    *,
    workers: int,
    shard: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """Writes the corpus; returns the content of meta.json, or None if `shard` (i, n) left the merge to another run.

    Shard i of n encodes the parts whose number leaves i when divided by n. Raises ValueError for whatever the user
    has to put right, the output directory of another corpus included.
    """
    selection = find_sources(inputs)
    plan = {
        "settings": {
            "inputs": list(inputs),
            "tokenizer": _describe_tokenizer(tokenizer),
            "text_field": settings.text_field,
            "valid_fraction": settings.valid_fraction,
        },
        "facts": selection.facts,
        "sources": [{"name": source.name, "size": source.size} for source in selection.sources],
    }
    work = output / WORK
    if (meta := finished(output, plan)) is not None:
        shutil.rmtree(work, ignore_errors=True)
        return meta
    claim(output, work, plan)
    parts = cut_into_parts(selection.sources)
    try:
        _provide_tokenizer(tokenizer, selection.sources, settings, work)
        first, step = shard or (0, 1)
        _encode(work, parts, settings, range(first, len(parts), step), workers)
    except ValueError:
        alone = shard is None  # another shard may be at work in there
        if alone and not any(part_directory(work, index).exists() for index in range(len(parts))):
            shutil.rmtree(work)  # nothing is lost, and the corrected command may have other settings
        raise
    return merge_parts(work, output, len(parts), plan) if shard is None else None


def _encode(work: Path, parts: list[list[Source]], settings: Settings, indices: range, workers: int) -> None:
    pending = [index for index in indices if not part_directory(work, index).exists()]
    with tqdm(total=len(indices), initial=len(indices) - len(pending), desc="encoding", unit="part") as bar:
        text = 0
        for progress in run_tasks(EncodePart(work, parts, settings), pending, workers):
            text += progress.units
            bar.set_postfix_str(f"{text / 1e6:.1f} MB of text", refresh=False)
            bar.update(progress.tasks)


def _describe_tokenizer(tokenizer: Path | Training) -> dict[str, Any]:
    return asdict(tokenizer) if isinstance(tokenizer, Training) else {"sha256": Tokenizer(tokenizer).sha256}


def _provide_tokenizer(tokenizer: Path | Training, sources: list[Source], settings: Settings, work: Path) -> None:
    path = work / "tokenizer.model"
    if path.exists():
        return
    if isinstance(tokenizer, Path):
        publish(path, tokenizer.read_bytes())
        return
    with tqdm(desc="reading text for the tokenizer", unit="B", unit_scale=True, leave=False) as bar:
        sample = _sample(sources, settings, tokenizer.sample_bytes, bar)
        if (first := next(sample, None)) is None:
            raise ValueError(
                "--input: no training document with text; a tokenizer is trained on some; check the files, "
                "--text-field and --valid-fraction"
            )
        train_tokenizer(itertools.chain([first], sample), tokenizer.vocab_size, path, tokenizer.kind)


def _sample(sources: list[Source], settings: Settings, budget: int, bar: tqdm) -> Iterator[str]:
    """The beginning of every source, in equal shares of `budget` bytes; what a short one leaves goes to longer ones.

    Held-out documents are left out. Reads no further than it uses.
    """
    shortest_first = sorted(sources, key=lambda source: source.size)
    for position, source in enumerate(shortest_first):
        share = budget // (len(sources) - position)
        for document in usable_documents(source, settings):
            text = document.text.encode()
            if is_held_out(text, settings.valid_fraction):
                continue
            taken = text[:share]
            yield taken.decode(errors="ignore")  # the cut may fall inside a character
            share, budget = share - len(taken), budget - len(taken)
            bar.update(len(taken))
            if share <= 0:
                break
    bar.set_description("training the tokenizer")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    settings = Settings(options.text_field, options.valid_fraction, options.skip_bad)
    tokenizer = options.tokenizer
    if isinstance(tokenizer, Training):
        tokenizer = dataclasses.replace(tokenizer, sample_bytes=options.sample_mb << 20)
    try:
        meta = prepare(options.input, tokenizer, options.output, settings, workers=options.workers, shard=options.shard)
    except (ValueError, RuntimeError) as error:
        return _fail(str(error))
    except OSError as error:
        place = error.filename or options.output
        return _fail(f"{place}: {error.strerror or error}; put that right and run the same command again to continue")
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue")
        return 130
    if meta is None:
        print(f"shard {options.shard[0]} of {options.shard[1]} is done; run without --shard to merge when all are")
        return 0
    for split, count in meta["splits"].items():
        print(
            f"{options.output / split}: {count['documents']:,} documents, {count['tokens']:,} tokens, "
            f"{count['bytes']:,} bytes"
        )
    skipped = ", ".join(f"{count} {reason}" for reason, count in meta["skipped"].items())
    print(f"vocabulary {meta['tokenizer']['vocab_size']}, skipped: {skipped or 'none'}, sha256 {meta['sha256']}")
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Turns text into a corpus of tokens. Run again after a kill, the same command continues; run again "
        "when done, it checks the files.",
        epilog="example: python -m data.prepare --input 'texts/*.jsonl.zst' --tokenizer train:32768 --output corpora/a",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="GLOB|python-stdlib|hf:NAME[:CONFIG[:SPLIT]]",
        help="files (.jsonl, .ndjson, .json: a document a line; .parquet: one a row; others: one a file; each also "
        ".gz or .zst), the Python standard library's source, or a data set to stream. One worker works on a file",
    )
    parser.add_argument(
        "--tokenizer",
        type=_tokenizer_option,
        required=True,
        metavar="PATH|train:VOCAB[:bpe|unigram]",
        help="a lossless SentencePiece model, or the size and kind (bpe) of one to train",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the corpus goes")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of the text in records (text)")
    parser.add_argument(
        "--valid-fraction",
        type=_fraction,
        default=0.05,
        metavar="F",
        help="share of documents held out, chosen by their hash (0.05)",
    )
    parser.add_argument(
        "--sample-mb", type=_positive, default=64, metavar="N", help="train a tokenizer on at most N MiB of text (64)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="skip and count what is no UTF-8 text; refused otherwise"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=_positive, default=cores, metavar="N", help=f"processes ({cores} here)")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="do share I (from 0) of N only and do not merge, as in a Slurm array",
    )
    return parser


def _tokenizer_option(value: str) -> Path | Training:
    if not value.startswith("train:"):
        return Path(value)
    size, _, kind = value.removeprefix("train:").partition(":")
    if not size.isdecimal() or kind not in ("", "bpe", "unigram"):
        raise argparse.ArgumentTypeError(
            f"value {value!r}; must be train:VOCAB, train:VOCAB:bpe or train:VOCAB:unigram"
        )
    return Training(int(size), "unigram" if kind == "unigram" else "bpe")


def _fraction(value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction < 1:
        raise argparse.ArgumentTypeError(f"value {value!r}; must be a number from 0 to below 1")
    return fraction


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"value {value!r}; must be a whole number from 1")
    return int(value)


def _shard(value: str) -> tuple[int, int]:
    index, _, count = value.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"value {value!r}; must be I/N with 0 <= I < N")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())
