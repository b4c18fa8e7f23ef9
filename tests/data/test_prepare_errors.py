import json
import shutil
from pathlib import Path

import pytest

from data.indexed import IndexedDataset
from data.plan import FILES
from data.prepare import main
from data.tokenizer import Tokenizer
from tests.data.preparing import arguments, error_of


def test_another_corpus_in_the_directory_is_refused(
    inputs: Path, expected: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {name: (expected / name).read_bytes() for name in FILES}
    changed = arguments(inputs, expected, tokenizer)
    assert "valid_fraction 0.2, here 0.1" in error_of([*changed, "--valid-fraction", "0.1"], capsys)
    assert "inputs" in error_of([*changed, "--input", str(inputs / "0.jsonl")], capsys)
    assert "tokenizer" in error_of(arguments(inputs, expected), capsys)
    assert before == {name: (expected / name).read_bytes() for name in FILES}
    assert main(arguments(inputs, tmp_path / "cut", tokenizer, "--shard", "0/2", "--workers", "1")) == 0
    message = error_of(arguments(inputs, tmp_path / "cut", tokenizer, "--valid-fraction", "0"), capsys)
    assert "holds a corpus made with valid_fraction 0.2, here 0.0; " in message
    assert message.endswith("choose another directory or remove it")
    (tmp_path / "train.bin").write_text("somebody's")
    assert "train.bin is in the way" in error_of(arguments(inputs, tmp_path, tokenizer), capsys)
    assert (tmp_path / "train.bin").read_text() == "somebody's"


def test_changed_inputs_are_refused(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    for index in range(30):
        (tmp_path / "in" / f"{index}.txt").write_text(f"text {index}")
    assert main(arguments(tmp_path / "in", tmp_path / "out", tokenizer, "--workers", "1")) == 0
    (tmp_path / "in" / "7.txt").write_text("longer text")
    message = error_of(arguments(tmp_path / "in", tmp_path / "out", tokenizer), capsys)
    assert "sources of other names, sizes or versions" in message


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_documents_are_refused_by_name_or_skipped_and_counted(
    inputs: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture, workers: str
) -> None:
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "in" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in" / "nothing.txt").write_bytes(b"")
    (tmp_path / "in" / "other.jsonl").write_text('{"a": 1}\n{"b": 2}\n{"text": "good"}\n')
    command = arguments(tmp_path / "in", tmp_path / "out", tokenizer, "--workers", workers)
    message = error_of(command, capsys)
    assert f"{tmp_path}/in/latin.txt: not UTF-8: byte 0xe9 at offset 3; " in message
    assert "run again with --skip-bad" in message
    assert main([*command, "--skip-bad"]) == 0
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["skipped"] == {
        "empty": 1,
        "no field 'text'": 2,
        "not UTF-8": 1,
    }
    assert "1 not UTF-8" in capsys.readouterr().out


def test_a_bad_document_in_one_shard_leaves_the_others_at_work(
    inputs: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "in" / "0.jsonl").write_bytes(b'{"text": "caf\xe9"}\n' + (inputs / "0.jsonl").read_bytes())
    at_work = tmp_path / "out" / ".parts" / "000001.beef.tmp"  # what shard 1 of 2 is writing
    at_work.mkdir(parents=True)
    command = arguments(tmp_path / "in", tmp_path / "out", tokenizer, "--workers", "1", "--shard", "0/2")
    assert "not UTF-8" in error_of(command, capsys)
    assert at_work.is_dir()


def test_a_bad_document_in_the_tokenizers_sample_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    command = ["--input", f"{tmp_path}/*.txt", "--tokenizer", "train:300", "--output", str(tmp_path / "out")]
    assert f"{tmp_path}/latin.txt: not UTF-8" in error_of(command, capsys)


def test_a_document_the_tokenizer_would_change_is_refused_by_name(
    inputs: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decode(self, ids).replace("small 3", "small 4"))
    message = error_of(arguments(inputs, tmp_path / "out", tokenizer, "--workers", "1"), capsys)
    assert "small3.txt: the tokenizer tokenizer.model does not give this text back exactly" in message


def test_empty_corpora_and_splits_are_refused_and_leave_the_directory_free(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.txt").write_text("")
    for model in (tokenizer, "train:300"):
        command = arguments(tmp_path / "in", tmp_path / "out", model, "--workers", "1")
        assert "--input: no " in error_of(command, capsys)
    (tmp_path / "in" / "a.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    assert "no field 'text': --text-field must be one of body" in error_of(command, capsys)
    command = arguments(tmp_path / "in", tmp_path / "out", tokenizer, "--workers", "1", "--text-field", "body")
    message = error_of([*command, "--valid-fraction", "0.001"], capsys)
    assert "--valid-fraction: value 0.001 leaves the held-out split of 2 document(s) empty" in message
    assert "leaves the training split of 2" in error_of([*command, "--valid-fraction", "0.999"], capsys)
    assert main([*command, "--valid-fraction", "0"]) == 0
    assert len(IndexedDataset(tmp_path / "out" / "valid")) == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tokenizer", "train:many", "must be train:VOCAB"),
        ("--tokenizer", "train:400:wordpiece", "must be train:VOCAB"),
        ("--valid-fraction", "1", "from 0 to below 1"),
        ("--workers", "0", "whole number from 1"),
        ("--shard", "3/3", "I/N with 0 <= I < N"),
        ("--sample-mb", "-1", "whole number from 1"),
        ("--nonsense", "1", "unrecognized arguments"),
    ],
)
def test_bad_usage_exits_with_2(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments(inputs, tmp_path / "out"), option, value])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_match_and_no_tokenizer_are_refused(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--input", f"{tmp_path}/*.txt", "--tokenizer", "train:300", "--output", str(tmp_path / "out")]
    assert "matches nothing" in error_of(command, capsys)
    missing = error_of(arguments(inputs, tmp_path / "out", str(tmp_path / "no.model")), capsys)
    assert "no.model (No such file or directory)" in missing
    assert not (tmp_path / "out").exists()
