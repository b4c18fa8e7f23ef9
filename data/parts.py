"""Parts: what one worker turns into tokens at a time, and what a killed preparation does not have to repeat.

A part is a run of sources. Its directory holds `train.bin/.idx`, `valid.bin/.idx` and `part.json`, and appears
under its name only once it is complete.
"""

import functools
import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.indexed import IndexedWriter
from data.plan import SPLITS
from data.publish import publish
from data.sources import BadDocument, Document, HubSource, Source
from data.tokenizer import Tokenizer

SMALLEST_PART = 1 << 20  # bytes of source; small files are gathered until a part has as many
MOST_GATHERED = 1024  # parts made of small files, about


@dataclass(frozen=True)
class Settings:
    """How documents are read. Bad ones are never part of a corpus: `skip_bad` goes on where it is refused otherwise."""

    text_field: str = "text"
    valid_fraction: float = 0.05
    skip_bad: bool = False


@dataclass
class SplitCount:
    """Size of a split; tokens include BOS and EOS, bytes are those of the text as UTF-8."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, tokens: int, size: int, documents: int = 1) -> None:
        self.documents += documents
        self.tokens += tokens
        self.bytes += size


@dataclass
class PartReport:
    """Content of part.json; `sources` has name, documents, bytes and sha256 of the texts of each source."""

    tokenizer_sha256: str
    splits: dict[str, SplitCount] = field(default_factory=lambda: {split: SplitCount() for split in SPLITS})
    skipped: dict[str, int] = field(default_factory=dict)
    sources: list[dict[str, str | int]] = field(default_factory=list)

    @staticmethod
    def read(directory: Path) -> "PartReport":
        report = PartReport(**json.loads((directory / "part.json").read_text()))
        report.splits = {split: SplitCount(**count) for split, count in report.splits.items()}  # type: ignore[arg-type]
        return report


def cut_into_parts(sources: Sequence[Source]) -> list[list[Source]]:
    """Groups consecutive small files; depends on the sources only, so that a restart finds the same parts."""
    smallest = max(SMALLEST_PART, sum(source.size for source in sources) // MOST_GATHERED)
    parts: list[list[Source]] = []
    room = 0
    for source in sources:
        streamed = isinstance(source, HubSource)
        if not parts or streamed or source.size > room:
            parts.append([])
            room = smallest
        parts[-1].append(source)
        room = 0 if streamed else room - source.size
    return parts


def part_directory(work: Path, index: int) -> Path:
    return work / f"{index:06d}"


def usable_documents(source: Source, settings: Settings, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """A source's documents that hold text; what cannot be used raises ValueError, or is counted with `skip_bad`."""
    for document in source.documents(settings.text_field):
        if isinstance(document, BadDocument):
            if not settings.skip_bad:
                raise ValueError(
                    f"{document.name}: {document.reason}; every document must be UTF-8 text; "
                    "run again with --skip-bad to skip and count such documents, or repair it and remove --output"
                )
            if skipped is not None:
                skipped[document.reason.split(":")[0]] += 1
        elif document.text:
            yield document
        elif skipped is not None:
            skipped["empty"] += 1


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: the first 8 bytes of its SHA-256, over 2**64, < fraction."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < fraction * 2**64


def encode_part(sources: Iterable[Source], directory: Path, tokenizer_path: Path, settings: Settings) -> Iterator[int]:
    """Writes a part's directory, yielding the bytes of each document; done when exhausted.

    Raises ValueError naming the document that is no text or that the tokenizer does not give back exactly.
    """
    for leftover in directory.parent.glob(f"{directory.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield from _write_part(sources, temporary, _tokenizer(tokenizer_path), settings)
        if not directory.exists():  # another run may have completed the same part meanwhile
            temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_part(sources: Iterable[Source], directory: Path, tokenizer: Tokenizer, settings: Settings) -> Iterator[int]:
    report, skipped = PartReport(tokenizer.sha256), Counter[str]()
    dtype = token_dtype(tokenizer.vocab_size)
    with IndexedWriter(directory / "train", dtype) as train, IndexedWriter(directory / "valid", dtype) as valid:
        for source in sources:
            digest, documents, size = hashlib.sha256(), 0, 0
            for document in usable_documents(source, settings, skipped):
                text, ids = document.text.encode(), _encode(tokenizer, document)
                held_out = is_held_out(text, settings.valid_fraction)
                (valid if held_out else train).add(ids)
                report.splits["valid" if held_out else "train"].add(len(ids), len(text))
                digest.update(text)
                documents, size = documents + 1, size + len(text)
                yield len(text)
            report.sources.append(
                {"name": source.name, "documents": documents, "bytes": size, "sha256": digest.hexdigest()}
            )
    report.skipped = dict(sorted(skipped.items()))
    publish(directory / "part.json", json.dumps(asdict(report)).encode())


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while it holds every id, else int32, as in Megatron."""
    return np.dtype(np.uint16 if vocab_size < 65536 else np.int32)


def _encode(tokenizer: Tokenizer, document: Document) -> list[int]:
    ids = tokenizer.encode(document.text)
    if tokenizer.decode(ids) != document.text:
        raise ValueError(
            f"{document.name}: the tokenizer {tokenizer.path.name} does not give this text back exactly; "
            "every document must survive encode and decode; leave it out, or train another tokenizer with "
            "--tokenizer train:VOCAB"
        )
    return [tokenizer.bos_id, *ids, tokenizer.eos_id]


@functools.cache
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)
