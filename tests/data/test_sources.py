import gzip
import json
import platform
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.sources import STDLIB_EXCLUDED, BadDocument, Document, FileSource, find_sources

TEXTS = ["one\n", "zwei \u00e4\r\n\tdrei", "\u2581 \x00 four", ""]


def json_lines() -> bytes:
    return "\n".join(json.dumps({"id": index, "text": text}) for index, text in enumerate(TEXTS)).encode() + b"\n\n"


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def read(path: Path, field: str = "text") -> list[Document | BadDocument]:
    (source,) = find_sources([str(path)]).sources
    return list(source.documents(field))


@pytest.mark.parametrize(
    "pack", [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)], ids=["", "gz", "zst"]
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "txt", "py"])
def test_reads_every_format(tmp_path: Path, kind: str, pack: tuple) -> None:
    content = {"jsonl": json_lines, "json": json_lines, "parquet": parquet}.get(kind, lambda: TEXTS[1].encode())()
    path = tmp_path / f"file.{kind}{pack[0]}"
    path.write_bytes(pack[1](content))
    expected = TEXTS if kind in ("jsonl", "json", "parquet") else TEXTS[1:2]
    assert [document.text for document in read(path) if isinstance(document, Document)] == expected


def test_names_point_at_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    assert [document.name for document in read(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:{line}" for line in (1, 2, 3, 4)
    ]
    (tmp_path / "a.txt").write_text("text")
    assert read(tmp_path / "a.txt") == [Document(f"{tmp_path}/a.txt", "text")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8: byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: not UTF-8: a lone surrogate"),
        ("a.jsonl", b'{"text": "whole"}\n{"text": "cut', "a.jsonl:2: not JSON: Unterminated string starting at"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "a.jsonl:1: no field 'text': --text-field must be one of body, id"),
        ("a.jsonl", b'["x"]', "a.jsonl:1: no field 'text': --text-field must be one of none"),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1: field 'text' holds NoneType, not text"),
        ("a.parquet", b"no parquet at all", "a.parquet: damaged file: "),
        ("a.txt.gz", b"no gzip", "a.txt.gz: damaged file: zlib inflate failed"),
        (
            "a.txt.gz",
            gzip.compress(bytes(range(128)) * 99)[:-20],
            "a.txt.gz: damaged file: Truncated compressed stream",
        ),
        (
            "a.jsonl.zst",
            zstandard.compress(json_lines())[:-3],
            "a.jsonl.zst: damaged file: Truncated compressed stream",
        ),
    ],
)
def test_bad_documents_are_named_with_the_reason(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    bad = [document for document in read(tmp_path / name) if isinstance(document, BadDocument)]
    assert len(bad) == 1
    assert f"{bad[0].name}: {bad[0].reason}".startswith(f"{tmp_path}/{expected}")


def test_a_missing_parquet_column_names_the_columns(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet())
    assert read(tmp_path / "a.parquet", "body") == [
        BadDocument(f"{tmp_path}/a.parquet", "no field 'body': --text-field must be one of id, text")
    ]


def test_globs_are_sorted_recursive_and_count_a_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "[odd].txt", "other.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_sources([f"{tmp_path}/[odd].txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/./a.txt"]).sources
    assert [Path(source.name).name for source in found] == ["[odd].txt", "a.txt", "b.txt", "c.txt"]
    assert [source.size for source in found] == [9, 5, 5, 9]


def test_no_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--input: value '.*\*\.txt' matches nothing; must match files; give"):
        find_sources([f"{tmp_path}/*.txt"])
    with pytest.raises(ValueError, match="matches a directory"):
        find_sources([str(tmp_path)])


def test_python_stdlib_is_source_without_tests_and_tables() -> None:
    sources, facts = find_sources(["python-stdlib"])
    record = facts["python-stdlib"]
    assert record["python"] == platform.python_version()
    assert all(word in record["filter"] for word in STDLIB_EXCLUDED)
    assert record["files"] == len(sources) > 400
    assert record["bytes"] == sum(source.size for source in sources) > 5_000_000
    assert len(record["sha256"]) == 64
    assert len({Path(source.path).read_bytes() for source in sources if isinstance(source, FileSource)}) == len(sources)
    names = [source.name for source in sources]
    assert names == sorted(names)
    assert {"python-stdlib/argparse.py", "python-stdlib/asyncio/tasks.py"} <= set(names)
    assert not any({*name.split("/")[1:-1]} & {"test", "encodings", "site-packages"} for name in names)
    assert find_sources(["python-stdlib"]) == (sources, facts)
    (argparse_source,) = [source for source in sources if source.name.endswith("/argparse.py")]
    assert isinstance(argparse_source, FileSource)
    assert "class ArgumentParser" in next(argparse_source.documents("text"))[1]


def test_streams_what_datasets_reads(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jsonl").write_text(
            "".join(json.dumps({"text": f"{index} {row}"}) + "\n" for row in range(4))
        )
    sources, facts = find_sources([f"hf:{tmp_path}"])
    assert [source.name for source in sources] == [f"hf:{tmp_path}:{shard}/3" for shard in range(3)]
    documents = [document for source in sources for document in source.documents("text")]
    assert [document[1] for document in documents] == [f"{index} {row}" for index in range(3) for row in range(4)]
    assert documents[5].name == f"hf:{tmp_path}:1/3:1"
    assert facts[f"hf:{tmp_path}"]["shards"] == 3
    for value in (f"hf:{tmp_path}:nosuch", f"hf:{tmp_path}::nosuch", f"hf:{tmp_path}/nosuch"):
        with pytest.raises(ValueError, match=r"--input: value hf:.*; must name a data set .* check hf:NAME"):
            find_sources([value])
