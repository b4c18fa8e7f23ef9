import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

import data.prepare
from data.indexed import IndexedDataset
from data.parts import Settings, is_held_out, token_dtype
from data.prepare import Training, main, prepare
from data.sources import Document, find_sources
from data.tokenizer import Tokenizer
from tests.data.preparing import arguments, assert_same


def test_the_corpus_holds_every_document_once_on_the_side_of_its_hash(inputs: Path, expected: Path) -> None:
    tokenizer = Tokenizer(expected / "tokenizer.model")
    found: dict[str, list[str]] = {"train": [], "valid": []}
    for split, texts in found.items():
        dataset = IndexedDataset(expected / split)
        dataset.verify()
        for index in range(len(dataset)):
            ids = dataset[index].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            texts.append(tokenizer.decode(ids))
    documents = [
        document.text
        for source in find_sources([f"{inputs}/*"]).sources
        for document in source.documents("text")
        if isinstance(document, Document)
    ]
    assert found["train"] == [text for text in documents if not is_held_out(text.encode(), 0.2)]
    assert found["valid"] == [text for text in documents if is_held_out(text.encode(), 0.2)]
    assert 0.1 < len(found["valid"]) / len(documents) < 0.3


def test_meta_describes_the_corpus(inputs: Path, expected: Path, tokenizer: Tokenizer) -> None:
    meta = json.loads((expected / "meta.json").read_text())
    assert meta["settings"]["tokenizer"] == {"sha256": tokenizer.sha256}
    assert meta["tokenizer"]["sha256"] == tokenizer.sha256
    assert meta["tokenizer"]["vocab_size"] == 400
    assert meta["dtype"] == "uint16"
    assert [source["name"] for source in meta["sources"]] == sorted(str(path) for path in inputs.iterdir())
    for split, count in meta["splits"].items():
        dataset = IndexedDataset(expected / split)
        assert (count["documents"], count["tokens"]) == (len(dataset), dataset.num_tokens)
        ids = dataset.tokens(0, dataset.num_tokens)
        assert count["bytes"] == tokenizer.token_bytes[ids].sum()
        assert count["sha256"] == sha256sum(expected / f"{split}.bin")
    small = next(source for source in meta["sources"] if source["name"].endswith("small0.txt"))
    assert small["sha256"] == sha256sum(inputs / "small0.txt")


def sha256sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_workers_and_shards_do_not_change_a_byte(
    inputs: Path, expected: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments(inputs, tmp_path / "workers", tokenizer, "--workers", "3")) == 0
    assert_same(tmp_path / "workers", expected)
    for shard in ("1/3", "0/3", "2/3"):
        assert main(arguments(inputs, tmp_path / "shards", tokenizer, "--workers", "1", "--shard", shard)) == 0
        assert not (tmp_path / "shards" / "meta.json").exists()
    assert "run without --shard to merge" in capsys.readouterr().out
    assert main(arguments(inputs, tmp_path / "shards", tokenizer)) == 0
    assert_same(tmp_path / "shards", expected)


def test_a_later_run_without_shard_does_what_is_missing(
    inputs: Path, expected: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert main(arguments(inputs, tmp_path / "a", tokenizer, "--workers", "1", "--shard", "0/2")) == 0
    parts = {path.name: path.stat().st_ino for path in (tmp_path / "a" / ".parts").iterdir()}
    assert {"000000", "000002"} <= set(parts)
    assert "000001" not in parts
    assert main(arguments(inputs, tmp_path / "a", tokenizer, "--workers", "1")) == 0
    assert_same(tmp_path / "a", expected)


def test_the_same_arguments_from_python(texts: Path, corpus: Path, tmp_path: Path) -> None:
    meta = prepare(
        [f"{texts}/*.jsonl"], Training(400, "bpe"), tmp_path / "again", Settings(valid_fraction=0.2), workers=2
    )
    assert meta == json.loads((corpus / "meta.json").read_text())
    assert_same(tmp_path / "again", corpus)


def test_a_tokenizer_learns_from_a_bounded_sample_of_training_documents(inputs: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    settings = Settings(valid_fraction=0.2)
    sources = find_sources([f"{inputs}/*"]).sources
    with data.prepare.tqdm(disable=True) as bar:
        seen = list(data.prepare._sample(sources, settings, 50_000, bar))
    assert 45_000 < sum(len(text.encode()) for text in seen) <= 50_000
    starts = Counter(text[0] for text in seen)
    assert set(starts) == {"0", "1", "2", "3", "s"}  # every file has its share
    whole = {document.text for source in sources for document in source.documents("text")}  # type: ignore[union-attr]
    assert not [text for text in seen if text in whole and is_held_out(text.encode(), 0.2)]


def test_identical_documents_fall_on_one_side() -> None:
    assert [is_held_out(b"same", 0.5) for _ in range(3)] == [is_held_out(b"same", 0.5)] * 3
    share = sum(is_held_out(str(index).encode(), 0.05) for index in range(20_000)) / 20_000
    assert share == pytest.approx(0.05, abs=0.006)
    assert not is_held_out(b"anything", 0.0)


def test_large_vocabularies_take_int32() -> None:
    assert token_dtype(65_535).name == "uint16"
    assert token_dtype(65_536).name == "int32"
