"""Megatron's indexed token files: PREFIX.bin holds the tokens, PREFIX.idx where sequences and documents lie.

PREFIX.idx, little-endian: the magic MMIDIDX and two zero bytes; uint64 version 1; uint8 dtype code; uint64 number of
sequences S; uint64 length of the document index; int32 [S] tokens of each sequence; int64 [S] byte offset of each in
PREFIX.bin; int64 [D + 1] index of each document's first sequence, the last entry being S.
Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py; GPT-NeoX writes the same.
"""

import hashlib
import os
import struct
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 1 << 20  # elements handled at once by whatever sweeps over a file
WAY_OUT = "copy the pair again or prepare the corpus again"


class IndexedDataset:
    """A pair PREFIX.bin, PREFIX.idx, read where it is asked for: opening it and keeping it open cost O(1).

    Nothing is mapped: a map would read ahead at every look into the index, and its pages would stay in the process.
    Opening checks the header and both sizes; `verify` sweeps the index as well. Both raise ValueError.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise ValueError(f"{path}: missing; PREFIX.bin and PREFIX.idx must both be there; {WAY_OUT}")
        index, tokens = _File(self.idx_path), _File(self.bin_path)
        if index.size < HEADER.size:
            raise ValueError(f"{self.idx_path}: {index.size} bytes; its header alone takes {HEADER.size}; {WAY_OUT}")
        magic, version, code, num_sequences, num_offsets = HEADER.unpack(index.read(0, HEADER.size))
        if magic != MAGIC or version != VERSION or code not in TOKEN_DTYPES or num_offsets < 1:
            raise ValueError(
                f"{self.idx_path}: header {magic!r}, version {version}, dtype code {code}; must be {MAGIC!r}, "
                f"version {VERSION}, an integer dtype of {sorted(TOKEN_DTYPES)}; {WAY_OUT}"
            )
        expected = HEADER.size + 12 * num_sequences + 8 * num_offsets
        if index.size != expected:
            raise ValueError(f"{self.idx_path}: {index.size} bytes; its header announces {expected}; {WAY_OUT}")
        self.dtype = np.dtype(TOKEN_DTYPES[code])
        self.lengths = StoredArray(index, np.int32, num_sequences, HEADER.size)
        self.pointers = StoredArray(index, np.int64, num_sequences, HEADER.size + 4 * num_sequences)
        self.document_index = StoredArray(index, np.int64, num_offsets, HEADER.size + 12 * num_sequences)
        end = self.pointers.at(-1) + self.lengths.at(-1) * self.dtype.itemsize if num_sequences else 0
        if tokens.size != end:
            raise ValueError(f"{self.bin_path}: {tokens.size} bytes; {self.idx_path.name} announces {end}; {WAY_OUT}")
        self._tokens = StoredArray(tokens, self.dtype, tokens.size // self.dtype.itemsize, 0)

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
        """Tokens start to stop of the whole stream, in the file's dtype."""
        return self._tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Offsets, int64 and rising, of the tokens in [start, stop) of the stream that begin a document."""
        documents = range(len(self))
        first = bisect_left(documents, start, key=self._start)
        reach = 1  # few documents begin in a row, so its end is sought from its beginning
        while first + reach < len(documents) and self._start(first + reach) < stop:
            reach *= 2
        last = bisect_left(documents, stop, lo=first, hi=min(first + reach, len(documents)), key=self._start)
        if first == last:
            return np.empty(0, dtype=np.int64)
        sequences = self.document_index[first:last]
        pointers = self.pointers[sequences[0] : sequences[-1] + 1][sequences - sequences[0]]
        return np.unique(pointers // self.dtype.itemsize)  # an empty document shares its offset

    def _start(self, document: int) -> int:
        sequence = self.document_index.at(document)
        if sequence == len(self.pointers):
            return self.num_tokens
        return self.pointers.at(sequence) // self.dtype.itemsize

    def verify(self, limit: int | None = None) -> None:
        """Sweeps over the index: sequences must lie end to end in the .bin and documents must follow each other.

        Args:
            limit: of an index with more sequences or documents, only as many, in runs at equal distances: for a check
                whose time must not grow with the corpus.
        """
        for start in _sweep(len(self.lengths), limit):
            self._verify_sequences(start)
        for start in _sweep(len(self.document_index), limit):
            chunk = self.document_index[start : start + CHUNK + 1]  # one more, to compare across the border
            if np.any(np.diff(chunk) < 0):
                raise ValueError(f"{self.idx_path}: damaged document index; its entries must not fall; {WAY_OUT}")
        first, last = self.document_index.at(0), self.document_index.at(-1)
        if first != 0 or last != len(self.lengths):
            raise ValueError(
                f"{self.idx_path}: document index from {first} to {last}; "
                f"must run from 0 to the {len(self.lengths)} sequences; {WAY_OUT}"
            )

    def _verify_sequences(self, start: int) -> None:
        """Of the sequences from `start`, a chunk: each begins where the one before it ends."""
        lengths = self.lengths[start : start + CHUNK].astype(np.int64)
        sizes = lengths * self.dtype.itemsize
        first = self.pointers.at(start - 1) + self.lengths.at(start - 1) * self.dtype.itemsize if start else 0
        if lengths.min() < 0 or np.any(self.pointers[start : start + CHUNK] != first + np.cumsum(sizes) - sizes):
            raise ValueError(
                f"{self.idx_path}: damaged between sequences {start} and {start + len(lengths)}; "
                f"sequences must lie end to end in the .bin; {WAY_OUT}"
            )


class _File:
    """A file that is read at any place, by any thread, and closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor).atexit = False  # a thread may read until the end
        self.size = os.fstat(self._descriptor).st_size
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead is 4 KB to 8 MB a look

    def read(self, offset: int, size: int) -> bytes:
        parts, missing = [], size
        while missing:  # one call gives 2 GB at most
            parts.append(os.pread(self._descriptor, missing, offset + size - missing))
            if not parts[-1]:
                raise ValueError(f"{self._path}: ends within what was asked for; it was cut while open; {WAY_OUT}")
            missing -= len(parts[-1])
        return b"".join(parts)


class StoredArray:
    """An array in a file, of which a slice is read when it is taken."""

    def __init__(self, file: _File, dtype: npt.DTypeLike, length: int, offset: int) -> None:
        self._file, self._dtype, self._length, self._offset = file, np.dtype(dtype), length, offset

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(self._length)
        assert step == 1, where
        itemsize = self._dtype.itemsize
        content = self._file.read(self._offset + start * itemsize, max(0, stop - start) * itemsize)
        return np.frombuffer(content, self._dtype)

    def at(self, index: int) -> int:
        """An entry; from the end where `index` is negative."""
        start = range(self._length)[index]
        return int(self[start : start + 1][0])


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


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
