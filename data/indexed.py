"""Megatron's indexed token files: PREFIX.bin holds the tokens, PREFIX.idx where sequences and documents lie.

PREFIX.idx, little-endian: the magic MMIDIDX and two zero bytes; uint64 version 1; uint8 dtype code; uint64 number of
sequences S; uint64 length of the document index; int32 [S] tokens of each sequence; int64 [S] byte offset of each in
PREFIX.bin; int64 [D + 1] index of each document's first sequence, the last entry being S.
Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py; GPT-NeoX writes the same.
"""

import hashlib
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 1 << 20  # elements handled at once by whatever sweeps over a file
WAY_OUT = "copy the pair again or prepare the corpus again"


class IndexedDataset:
    """A pair PREFIX.bin, PREFIX.idx, mapped into memory: opening it and keeping it open cost O(1).

    Opening checks the header and both sizes; `verify` sweeps the index as well. Both raise ValueError.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise ValueError(f"{path}: missing; PREFIX.bin and PREFIX.idx must both be there; {WAY_OUT}")
        index = _map(self.idx_path)
        if len(index) < HEADER.size:
            raise ValueError(f"{self.idx_path}: {len(index)} bytes; its header alone takes {HEADER.size}; {WAY_OUT}")
        magic, version, code, num_sequences, num_offsets = HEADER.unpack_from(index)
        if magic != MAGIC or version != VERSION or code not in TOKEN_DTYPES or num_offsets < 1:
            raise ValueError(
                f"{self.idx_path}: header {magic!r}, version {version}, dtype code {code}; must be {MAGIC!r}, "
                f"version {VERSION}, an integer dtype of {sorted(TOKEN_DTYPES)}; {WAY_OUT}"
            )
        expected = HEADER.size + 12 * num_sequences + 8 * num_offsets
        if len(index) != expected:
            raise ValueError(f"{self.idx_path}: {len(index)} bytes; its header announces {expected}; {WAY_OUT}")
        self.dtype = np.dtype(TOKEN_DTYPES[code])
        self._pointers_offset = HEADER.size + 4 * num_sequences
        self._documents_offset = HEADER.size + 12 * num_sequences
        self.lengths = np.frombuffer(index, np.int32, num_sequences, HEADER.size)
        self.pointers = np.frombuffer(index, np.int64, num_sequences, self._pointers_offset)
        self.document_index = np.frombuffer(index, np.int64, num_offsets, self._documents_offset)
        tokens = _map(self.bin_path)
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if num_sequences else 0
        if len(tokens) != end:
            raise ValueError(f"{self.bin_path}: {len(tokens)} bytes; {self.idx_path.name} announces {end}; {WAY_OUT}")
        self._tokens = np.frombuffer(tokens, self.dtype)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.document_index) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        """All tokens of a document, in the file's dtype."""
        if not 0 <= document < len(self):
            raise IndexError(f"{self.prefix}: document {document} of {len(self)}")
        return self.tokens(self._start(document), self._start(document + 1))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of the whole stream, in the file's dtype, as a view of the mapped file."""
        return self._tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Offsets, int64 and rising, of the tokens in [start, stop) of the stream that begin a document."""
        documents = range(len(self))
        first = bisect_left(documents, start, key=self._start)
        last = bisect_left(documents, stop, lo=first, key=self._start)
        sequences = self.document_index[first:last]
        return np.unique(self.pointers[sequences] // self.dtype.itemsize)  # an empty document shares its offset

    def _start(self, document: int) -> int:
        sequence = int(self.document_index[document])
        if sequence == len(self.pointers):
            return self.num_tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def verify(self, limit: int | None = None) -> None:
        """Sweeps over the index: sequences must lie end to end in the .bin and documents must follow each other.

        What it looks at is read, not mapped, so that no more than a chunk of it is held.

        Args:
            limit: of an index with more sequences or documents, only as many, in runs at equal distances: for a check
                whose time must not grow with the corpus.
        """
        with open(self.idx_path, "rb") as index:
            for start in _sweep(len(self.lengths), limit):
                self._verify_sequences(index, start)
            for start in _sweep(len(self.document_index), limit):
                entries = min(CHUNK + 1, len(self.document_index) - start)  # one more, to compare across the border
                if np.any(np.diff(_read(index, np.int64, self._documents_offset, start, entries)) < 0):
                    raise ValueError(f"{self.idx_path}: damaged document index; its entries must not fall; {WAY_OUT}")
        if self.document_index[0] != 0 or self.document_index[-1] != len(self.lengths):
            raise ValueError(
                f"{self.idx_path}: document index from {self.document_index[0]} to {self.document_index[-1]}; "
                f"must run from 0 to the {len(self.lengths)} sequences; {WAY_OUT}"
            )

    def _verify_sequences(self, index: BinaryIO, start: int) -> None:
        """Of the sequences from `start`, a chunk: each begins where the one before it ends."""
        count = min(CHUNK, len(self.lengths) - start)
        lengths = _read(index, np.int32, HEADER.size, start, count).astype(np.int64)
        pointers = _read(index, np.int64, self._pointers_offset, start, count)
        sizes = lengths * self.dtype.itemsize
        first = int(self.pointers[start - 1]) + int(self.lengths[start - 1]) * self.dtype.itemsize if start else 0
        if lengths.min() < 0 or np.any(pointers != first + np.cumsum(sizes) - sizes):
            raise ValueError(
                f"{self.idx_path}: damaged between sequences {start} and {start + len(lengths)}; "
                f"sequences must lie end to end in the .bin; {WAY_OUT}"
            )


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx, each document as one sequence, in O(1) memory.

    The .idx appears in `close`, so that a pair cut short cannot be opened. As a context manager it closes
    when the block succeeds and leaves no .idx when it fails.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.num_tokens = self.num_documents = 0
        self.sha256 = ""  # of the .bin, set by close
        self._digest = hashlib.sha256()
        self._bin: BinaryIO = open(f"{prefix}.bin", "wb")  # noqa: SIM115 - closed in close or __exit__
        self._lengths_path = Path(f"{prefix}.lengths")
        self._lengths: BinaryIO = open(self._lengths_path, "w+b")  # noqa: SIM115

    def add(self, ids: Sequence[int]) -> None:
        """Appends one document."""
        self._append(np.asarray(ids, dtype=self.dtype), np.asarray([len(ids)], dtype=np.int32))

    def extend(self, dataset: IndexedDataset) -> None:
        """Appends all documents of a dataset written with one sequence a document, in the same dtype."""
        assert dataset.dtype == self.dtype, (dataset.prefix, dataset.dtype, self.dtype)
        assert len(dataset) == len(dataset.lengths), (dataset.prefix, len(dataset), len(dataset.lengths))
        for start in range(0, dataset.num_tokens, CHUNK):
            self._append(dataset.tokens(start, start + CHUNK), np.empty(0, dtype=np.int32))
        for start in range(0, len(dataset), CHUNK):
            self._append(np.empty(0, dtype=self.dtype), dataset.lengths[start : start + CHUNK])

    def _append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        content = tokens.tobytes()
        self._bin.write(content)
        self._digest.update(content)
        self._lengths.write(lengths.tobytes())
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)

    def close(self) -> None:
        """Completes the pair on disk."""
        _sync_and_close(self._bin)
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self.dtype)
        with open(f"{self.prefix}.idx", "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1))
            self._copy_lengths(index, as_pointers=False)
            self._copy_lengths(index, as_pointers=True)
            for start in range(0, self.num_documents + 1, CHUNK):
                index.write(np.arange(start, min(start + CHUNK, self.num_documents + 1), dtype=np.int64).tobytes())
            _sync_and_close(index)
        self._lengths.close()
        self._lengths_path.unlink()
        self.sha256 = self._digest.hexdigest()

    def _copy_lengths(self, index: BinaryIO, *, as_pointers: bool) -> None:
        self._lengths.seek(0)
        end = 0
        while chunk := self._lengths.read(4 * CHUNK):
            lengths = np.frombuffer(chunk, np.int32)
            if as_pointers:
                stops = end + np.cumsum(lengths.astype(np.int64) * self.dtype.itemsize)
                end = int(stops[-1])
                index.write((stops - lengths.astype(np.int64) * self.dtype.itemsize).tobytes())
            else:
                index.write(chunk)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()
            self._lengths.close()


def _sweep(count: int, limit: int | None) -> range:
    """Where the chunks begin that a sweep over `count` entries looks at."""
    chunks = -(-count // CHUNK)
    visited = chunks if limit is None else min(chunks, max(1, limit // CHUNK))
    return range(0, count, CHUNK * -(-chunks // visited)) if chunks else range(0)


def _read(file: BinaryIO, dtype: type[np.generic], offset: int, start: int, count: int) -> np.ndarray:
    """Entries from `start` of an array that lies at `offset` in the file."""
    itemsize = np.dtype(dtype).itemsize
    file.seek(offset + start * itemsize)
    return np.frombuffer(file.read(count * itemsize), dtype)


def _map(path: Path) -> mmap.mmap | bytes:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""  # an empty file cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
