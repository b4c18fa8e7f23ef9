"""Where text comes from: files by glob, the Python standard library's source, anything `datasets` streams.

A source is one file or one shard of a streamed data set. It names itself and yields its documents in a fixed
order; a document that cannot be used is yielded as a BadDocument, so that the caller may refuse it or go on.
"""

import functools
import glob
import hashlib
import io
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
STDLIB = "python-stdlib"
STDLIB_EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")


class Document(NamedTuple):
    """A text and the name by which a message can point at it."""

    name: str
    text: str


class BadDocument(NamedTuple):
    """Something in a source that is no usable text, and why: a kind that can be counted, a colon, details."""

    name: str
    reason: str


Documents = Iterator[Document | BadDocument]


@dataclass(frozen=True)
class FileSource:
    """A file: `.jsonl`, `.ndjson`, `.json` hold a document a line, `.parquet` one a row; any other is one document."""

    name: str
    path: str
    size: int

    def documents(self, text_field: str) -> Documents:
        stem, compression = os.path.splitext(self.path)
        kind = os.path.splitext(stem)[1] if compression in COMPRESSIONS else compression
        try:
            with _open(self.path, COMPRESSIONS.get(compression)) as file:
                if kind in JSON_LINES:
                    yield from _json_lines(self.name, file, text_field)
                elif kind == ".parquet":
                    yield from _parquet_rows(self.name, file, text_field)
                else:
                    yield _decoded(self.name, file.read())
        except (OSError, ValueError) as error:
            # Both name damage inside the file: Arrow's decompressors raise OSError without an errno.
            if getattr(error, "errno", None) is not None:
                raise
            yield BadDocument(self.name, f"damaged file: {str(error).splitlines()[0]}")


@dataclass(frozen=True)
class HubSource:
    """One shard of a data set streamed by `datasets`."""

    name: str
    dataset: str
    config: str | None
    split: str
    shard: int
    num_shards: int
    size: int = 0  # not known

    def documents(self, text_field: str) -> Documents:
        stream = _builder(self.dataset, self.config).as_streaming_dataset(split=self.split)
        try:
            for row, record in enumerate(stream.shard(num_shards=self.num_shards, index=self.shard)):
                yield _from_record(f"{self.name}:{row}", record, text_field)
        except Exception as error:  # `datasets` raises many kinds, from the network's to the file formats'
            raise RuntimeError(f"{self.name}: {_describe(error)}; run the same command again to continue") from error


Source = FileSource | HubSource


class Selection(NamedTuple):
    """All sources of a corpus in order, and what describes them beyond their own checksums."""

    sources: list[Source]
    facts: dict[str, Any]


def find_sources(inputs: Sequence[str]) -> Selection:
    """Resolves `--input` values: a glob or path, `python-stdlib`, or `hf:NAME[:CONFIG[:SPLIT]]`.

    The files of a glob are sorted by name; a file named twice counts once. Raises ValueError if a value matches none.
    """
    sources: dict[str, Source] = {}
    facts: dict[str, Any] = {}
    for value in inputs:
        if value == STDLIB:
            found, facts[STDLIB] = _stdlib()
        elif value.startswith("hf:"):
            found, facts[value] = _hub(value)
        else:
            found = _files(value)
        sources.update((source.name, source) for source in found)
    return Selection(list(sources.values()), facts)


def _files(pattern: str) -> list[Source]:
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(os.path.normpath(path) for path in matches if os.path.isfile(path))
    if not files:
        found = "a directory" if os.path.isdir(pattern) else "nothing"
        raise ValueError(
            f"--input: value {pattern!r} matches {found}; must match files; give a path or a quoted glob such as "
            "'corpus/**/*.jsonl', or python-stdlib, or hf:NAME"
        )
    return [FileSource(path, path, os.path.getsize(path)) for path in files]


def _stdlib() -> tuple[list[Source], dict[str, Any]]:
    """Source files of the running Python's standard library: no tests, no tables, UTF-8, each content once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for directory, below, files in os.walk(root):
        below[:] = [name for name in below if name not in STDLIB_EXCLUDED]
        paths.extend(Path(directory, name) for name in files if name.endswith(".py"))
    sources: list[Source] = []
    digest, seen = hashlib.sha256(), {b""}
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        content = path.read_bytes()
        if content in seen or isinstance(_decoded("", content), BadDocument):
            continue
        seen.add(content)
        digest.update(content)
        sources.append(FileSource(f"{STDLIB}/{path.relative_to(root).as_posix()}", str(path), len(content)))
    facts = {
        "python": platform.python_version(),
        "filter": f"*.py outside directories named {', '.join(STDLIB_EXCLUDED)}; UTF-8, not empty, each content once",
        "files": len(sources),
        "bytes": sum(source.size for source in sources),
        "sha256": digest.hexdigest(),
    }
    return sources, facts


def _hub(value: str) -> tuple[list[Source], dict[str, Any]]:
    dataset, config, split = [*value.split(":")[1:], "", "", ""][:3]
    split = split or "train"
    try:
        builder = _builder(dataset, config or None)
        count = builder.as_streaming_dataset(split=split).num_shards
    except Exception as error:
        raise ValueError(
            f"--input: value {value}; must name a data set that datasets.load_dataset can stream ({_describe(error)}); "
            "check hf:NAME[:CONFIG[:SPLIT]] and the network"
        ) from error
    sources: list[Source] = [
        HubSource(f"{value}:{shard}/{count}", dataset, config or None, split, shard, count) for shard in range(count)
    ]
    return sources, {"shards": count, "version": str(builder.info.version), "fingerprint": builder.hash}


def _describe(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


@functools.cache
def _builder(dataset: str, config: str | None) -> Any:
    import datasets

    return datasets.load_dataset_builder(dataset, config)


def _open(path: str, compression: str | None) -> BinaryIO:
    if compression is None:
        return open(path, "rb")
    import pyarrow

    # Unlike the zstandard package, Arrow reports a compressed file that ends too early.
    stream: Any = pyarrow.input_stream(path, compression=compression)
    return io.BufferedReader(stream, 1 << 20)


def _json_lines(name: str, file: BinaryIO, text_field: str) -> Documents:
    for number, line in enumerate(file, start=1):
        place = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            yield _from_record(place, json.loads(line.decode()), text_field)
        except UnicodeDecodeError:
            yield BadDocument(place, "not UTF-8")
        except (json.JSONDecodeError, RecursionError) as error:
            yield BadDocument(place, f"not JSON: {error}")


def _parquet_rows(name: str, file: BinaryIO, text_field: str) -> Documents:
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        if not file.seekable():
            shutil.copyfileobj(file, unpacked)
        table = pyarrow.parquet.ParquetFile(file if file.seekable() else unpacked)
        if text_field not in table.schema_arrow.names:
            yield BadDocument(name, _no_field(text_field, table.schema_arrow.names))
            return
        rows = (row for batch in table.iter_batches(batch_size=256, columns=[text_field]) for row in batch.to_pylist())
        for number, record in enumerate(rows):
            yield _from_record(f"{name}:{number}", record, text_field)


def _from_record(name: str, record: Any, text_field: str) -> Document | BadDocument:
    if not isinstance(record, dict) or text_field not in record:
        return BadDocument(name, _no_field(text_field, list(record) if isinstance(record, dict) else []))
    text = record[text_field]
    if not isinstance(text, str):
        return BadDocument(name, f"field {text_field!r} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocument(name, "not UTF-8: a lone surrogate")
    return Document(name, text)


def _no_field(text_field: str, fields: Sequence[str]) -> str:
    return f"no field {text_field!r}: --text-field must be one of {', '.join(map(str, fields)) or 'none'}"


def _decoded(name: str, content: bytes) -> Document | BadDocument:
    try:
        return Document(name, content.decode())
    except UnicodeDecodeError as error:
        return BadDocument(name, f"not UTF-8: byte {content[error.start]:#04x} at offset {error.start}")
