import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import CorpusConfig, DataConfig
from data.corpus import check_data, open_train, open_valid
from data.indexed import IndexedDataset, IndexedWriter
from data.parts import Settings
from data.prepare import Training, prepare
from data.tokenizer import Tokenizer


def config(*paths: Path | str, length: int = 16, **options) -> DataConfig:
    corpora = tuple(CorpusConfig(path=str(path)) for path in paths)
    return DataConfig(corpora=corpora, sequence_length=length, **options)


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def pair(corpus: Path, tmp_path: Path) -> Path:
    """The training split as a foreign pair."""
    for suffix in ("bin", "idx"):
        shutil.copyfile(corpus / f"train.{suffix}", tmp_path / f"pair.{suffix}")
    return tmp_path / "pair"


def edit_meta(directory: Path, change: Callable[[dict], None]) -> None:
    meta = json.loads((directory / "meta.json").read_text())
    change(meta)
    (directory / "meta.json").write_text(json.dumps(meta))


def test_accepts_and_returns_the_tokenizer(corpus: Path, pair: Path) -> None:
    assert check_data(config(corpus), 400) == corpus / "tokenizer.model"
    assert check_data(config(corpus, corpus), 512) == corpus / "tokenizer.model"  # padded to a multiple of 512
    foreign = config(pair)
    assert check_data(foreign, 400, validation=False) is None
    named = config(pair, tokenizer=str(corpus / "tokenizer.model"), validation=(str(corpus),))
    assert check_data(named, 400) == corpus / "tokenizer.model"


@pytest.mark.parametrize("vocab_size", [300, 399, 401, 500, 4096])
def test_refuses_a_vocabulary_that_does_not_match(corpus: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"model\.vocab_size: value {vocab_size}; must be the 400 .* set it to 400"):
        check_data(config(corpus), vocab_size)


def test_refuses_token_files_of_a_larger_vocabulary(pair: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"pair: holds the token id 3\d\d; .* vocabulary of 300"):
        check_data(config(pair), 300, validation=False)
    with IndexedWriter(pair, IndexedDataset(pair).dtype) as writer:
        writer.add([400] * 20)
    with pytest.raises(ValueError, match="holds the token id 400"):
        check_data(config(pair, tokenizer=str(tokenizer.path)), 400, validation=False)


def test_refuses_a_sequence_longer_than_the_corpus(corpus: Path) -> None:
    tokens = IndexedDataset(corpus / "train").num_tokens
    check_data(config(corpus, length=tokens - 1), 400)
    with pytest.raises(ValueError, match=rf"data\.sequence_length: value {tokens}; must be below the {tokens} tokens"):
        check_data(config(corpus, length=tokens), 400)


def test_refuses_tokenizers_that_differ(corpus: Path, tmp_path: Path, texts: Path) -> None:
    other = tmp_path / "other"
    prepare([f"{texts}/0.jsonl"], Training(350, "bpe"), other, Settings(valid_fraction=0.2), workers=1)
    with pytest.raises(ValueError, match=r"data\.corpora\.1\.path: .*other was made with tokenizer .* one run must"):
        check_data(config(corpus, other), 400)
    with pytest.raises(ValueError, match=r"data\.corpora\.0\.path: .* data\.tokenizer \(.*other/tokenizer\.model\) is"):
        check_data(config(corpus, tokenizer=str(other / "tokenizer.model")), 350)
    shutil.copyfile(other / "tokenizer.model", tmp_path / "kept.model")
    edit_meta(other, lambda meta: meta["tokenizer"].update(sha256="0" * 64))
    with pytest.raises(ValueError, match=r"other/tokenizer\.model: sha256 .*, meta\.json names 0000"):
        check_data(config(other), 350)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "train.bin").unlink(), r"train\.bin: missing"),
        (lambda path: (path / "valid.idx").unlink(), r"valid\.idx: missing"),
        (lambda path: os.truncate(path / "train.bin", 1000), r"train\.bin: 1000 bytes; train\.idx announces"),
        (lambda path: os.truncate(path / "train.idx", 1000), r"train\.idx: 1000 bytes; its header announces"),
        (lambda path: (path / "tokenizer.model").unlink(), r"tokenizer\.model: sha256 missing, meta\.json names"),
        (lambda path: (path / "meta.json").write_text("{"), r"meta\.json: damaged"),
        (lambda path: edit_meta(path, lambda meta: meta.update(format=99)), r"format 99; this version reads format 1"),
        (
            lambda path: (path / "meta.json").unlink(),
            r"data\.corpora\.0\.path: .* must be a directory with a meta\.json",
        ),
    ],
)
def test_refuses_a_damaged_corpus(copy: Path, change: Callable[[Path], None], message: str) -> None:
    change(copy)
    with pytest.raises(ValueError, match=message) as raised:
        check_data(config(copy), 400)
    assert str(raised.value).startswith(f"data.corpora.0.path: value {copy}")


def test_damage_names_the_key_of_the_corpus_that_has_it(corpus: Path, copy: Path, pair: Path) -> None:
    os.truncate(copy / "valid.bin", 1000)
    with pytest.raises(ValueError, match=rf"^data\.corpora\.1\.path: value {copy}; .*valid\.bin: 1000 bytes"):
        check_data(config(corpus, copy), 400)
    with pytest.raises(ValueError, match=rf"^data\.validation\.0: value {copy}; .*valid\.bin: 1000 bytes"):
        open_valid(config(corpus, validation=(str(copy),)))
    Path(f"{pair}.bin").unlink()
    with pytest.raises(ValueError, match=rf"^data\.corpora\.0\.path: value {pair}; .*pair\.bin: missing"):
        open_train(config(pair))


def test_refuses_files_of_different_preparations(copy: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copyfile(copy / f"valid.{suffix}", copy / f"train.{suffix}")
    with pytest.raises(ValueError, match=r"train\.bin: \d+ tokens; meta\.json counts \d+"):
        check_data(config(copy), 400)


def test_refuses_a_damaged_index(pair: Path) -> None:
    with open(f"{pair}.idx", "r+b") as file:
        file.seek(34)
        file.write(bytes(4))
    with pytest.raises(ValueError, match=r"^data\.corpora\.0\.path: .*pair\.idx: damaged"):
        check_data(config(pair), 400, validation=False)


def test_refuses_what_is_not_there_or_not_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.corpora\.0\.path: value nowhere; .* prepare it or give its path"):
        check_data(config("nowhere"), 400)
    (tmp_path / ".parts").mkdir()
    with pytest.raises(ValueError, match="unfinished: run that command again"):
        check_data(config(tmp_path), 400)


def test_refuses_empty_and_missing_held_out_data(corpus: Path, pair: Path, tmp_path: Path, texts: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.corpora\.1\.path: .* has no held-out split; .* data\.validation"):
        check_data(config(corpus, pair), 400)
    whole = tmp_path / "whole"
    prepare([f"{texts}/0.jsonl"], corpus / "tokenizer.model", whole, Settings(valid_fraction=0), workers=1)
    with pytest.raises(ValueError, match=r"has no held-out text; .* larger --valid-fraction"):
        check_data(config(whole), 400)
    assert check_data(config(whole), 400, validation=False) == whole / "tokenizer.model"
    with IndexedWriter(tmp_path / "empty", IndexedDataset(pair).dtype):
        pass
    with pytest.raises(ValueError, match="holds no tokens"):
        check_data(config(tmp_path / "empty"), 400, validation=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpora": ()}, r"^corpora: value \(\)"),
        ({"sequence_length": 0}, r"^sequence_length: value 0"),
        ({"seed": -1}, r"^seed: value -1"),
        ({"prefetch": -1}, r"^prefetch: value -1"),
        ({"validation": ()}, r"^validation: value \(\)"),
    ],
)
def test_config_refuses_bad_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"corpora": (CorpusConfig(path="a"),), "sequence_length": 8, **options})


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_config_refuses_bad_weights(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight: value .* for a; must be a positive number"):
        CorpusConfig(path="a", weight=weight)
