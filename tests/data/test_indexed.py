import os
import struct
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.indexed import IndexedDataset, IndexedWriter

# Documents as Megatron stores them: a list of sequences each. One document is empty, one sequence too.
DOCUMENTS = [[[5, 6, 7], [8]], [], [[9, 10]], [[], [11, 12, 13]], [[14]]]


def write_as_megatron(prefix: Path, documents: list[list[list[int]]], code: int, letter: str) -> None:
    """The format spelled out byte by byte, independent of the writer under test."""
    sequences = [sequence for document in documents for sequence in document]
    size = struct.calcsize(f"<{letter}")
    pointers, end = [], 0
    for sequence in sequences:
        pointers.append(end)
        end += size * len(sequence)
    starts = [0]
    for document in documents:
        starts.append(starts[-1] + len(document))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(starts))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    index += b"".join(struct.pack("<q", pointer) for pointer in pointers)
    index += b"".join(struct.pack("<q", start) for start in starts)
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack(f"<{letter}", token) for s in sequences for token in s))


@pytest.mark.parametrize(("code", "letter", "dtype"), [(8, "H", np.uint16), (4, "i", np.int32), (5, "q", np.int64)])
def test_reads_what_megatron_writes(tmp_path: Path, code: int, letter: str, dtype: type) -> None:
    write_as_megatron(tmp_path / "foreign", DOCUMENTS, code, letter)
    dataset = IndexedDataset(tmp_path / "foreign")
    dataset.verify()
    assert dataset.dtype == dtype
    assert dataset.num_tokens == 10
    flat = [[token for sequence in document for token in sequence] for document in DOCUMENTS]
    assert [dataset[i].tolist() for i in range(len(dataset))] == flat
    assert dataset.tokens(3, 8).tolist() == [8, 9, 10, 11, 12]
    for start in range(11):
        for stop in range(start, 11):
            expected = sorted({0, 4, 6, 9} & set(range(start, stop)))
            assert dataset.document_starts(start, stop).tolist() == expected, (start, stop)


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_writes_what_megatron_writes(tmp_path: Path, dtype: type, code: int, letter: str) -> None:
    documents = [[1, 2, 3], [4], [60000, 6]]
    write_as_megatron(tmp_path / "expected", [[document] for document in documents], code, letter)
    with IndexedWriter(tmp_path / "whole", dtype) as writer:
        for document in documents:
            writer.add(document)
    with IndexedWriter(tmp_path / "merged", dtype) as writer:
        for part in (documents[:2], [], documents[2:]):
            with IndexedWriter(tmp_path / "part", dtype) as part_writer:
                for document in part:
                    part_writer.add(document)
            writer.extend(IndexedDataset(tmp_path / "part"))
    for suffix in ("bin", "idx"):
        expected = (tmp_path / f"expected.{suffix}").read_bytes()
        assert (tmp_path / f"whole.{suffix}").read_bytes() == expected
        assert (tmp_path / f"merged.{suffix}").read_bytes() == expected
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(["expected", "whole", "merged", "part"] * 2)


def test_a_failed_write_leaves_no_index(tmp_path: Path) -> None:
    def write() -> None:
        with IndexedWriter(tmp_path / "cut", np.dtype(np.uint16)) as writer:
            writer.add([1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    with pytest.raises(ValueError, match=r"cut\.idx: missing"):
        IndexedDataset(tmp_path / "cut")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_an_error_and_leaves_no_index(tmp_path: Path) -> None:
    (tmp_path / "full.bin").symlink_to("/dev/full")
    writer = IndexedWriter(tmp_path / "full", np.dtype(np.uint16))
    writer.add([1, 2])
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert not (tmp_path / "full.idx").exists()


def damage(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(content)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("foreign.idx", lambda path: path.unlink(), r"foreign\.idx: missing; PREFIX\.bin and PREFIX\.idx"),
        ("foreign.bin", lambda path: path.unlink(), r"foreign\.bin: missing"),
        ("foreign.idx", lambda path: path.write_bytes(b"MMIDIDX"), r"foreign\.idx: 7 bytes"),
        ("foreign.idx", lambda path: os.truncate(path, 80), r"foreign\.idx: 80 bytes; its header announces 154"),
        ("foreign.bin", lambda path: os.truncate(path, 10), r"foreign\.bin: 10 bytes; foreign\.idx announces 20"),
        ("foreign.bin", lambda path: path.write_bytes(bytes(22)), r"foreign\.bin: 22 bytes"),
        ("foreign.idx", lambda path: damage(path, 0, b"XX"), "header b'XXIDIDX"),
        ("foreign.idx", lambda path: damage(path, 9, b"\x02"), "version 2"),
        ("foreign.idx", lambda path: damage(path, 17, b"\x06"), "dtype code 6"),
    ],
)
def test_refuses_missing_truncated_and_foreign_files(tmp_path: Path, name: str, change, message: str) -> None:
    write_as_megatron(tmp_path / "foreign", DOCUMENTS, 8, "H")
    change(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (34, struct.pack("<i", 2), "end to end"),
        (34 + 4 * 6 + 8, struct.pack("<q", 4), "end to end"),
        (-16, struct.pack("<q", -1), "must not fall"),
        (-48, struct.pack("<q", 1), "must run from 0"),
    ],
)
def test_verify_finds_a_damaged_index(tmp_path: Path, offset: int, content: bytes, message: str) -> None:
    write_as_megatron(tmp_path / "foreign", DOCUMENTS, 8, "H")
    damage(tmp_path / "foreign.idx", offset, content)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "foreign").verify()


def test_an_empty_pair_is_read(tmp_path: Path) -> None:
    write_as_megatron(tmp_path / "empty", [], 8, "H")
    dataset = IndexedDataset(tmp_path / "empty")
    dataset.verify()
    assert (dataset.num_tokens, len(dataset)) == (0, 0)


def test_a_file_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    write_as_megatron(tmp_path / "foreign", DOCUMENTS, 8, "H")
    dataset = IndexedDataset(tmp_path / "foreign")
    os.truncate(tmp_path / "foreign.bin", 4)
    with pytest.raises(ValueError, match=r"foreign\.bin: ends within what was asked for; it was cut while open; copy"):
        dataset.tokens(0, dataset.num_tokens)


def test_what_one_call_does_not_give_the_next_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as_megatron(tmp_path / "foreign", DOCUMENTS, 8, "H")
    whole = IndexedDataset(tmp_path / "foreign")
    expected, pread = whole.tokens(0, whole.num_tokens).tolist(), os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 3), offset))
    assert whole.tokens(0, whole.num_tokens).tolist() == expected


def test_files_are_closed_with_the_dataset(tmp_path: Path) -> None:
    write_as_megatron(tmp_path / "foreign", DOCUMENTS, 8, "H")

    def opened() -> list[str]:
        return [one.path for one in psutil.Process().open_files() if "foreign" in one.path]

    dataset = IndexedDataset(tmp_path / "foreign")
    lengths = dataset.lengths
    assert len(opened()) == 2
    del dataset
    assert lengths[:].tolist() == IndexedDataset(tmp_path / "foreign").lengths[:].tolist()
    del lengths
    assert opened() == []
