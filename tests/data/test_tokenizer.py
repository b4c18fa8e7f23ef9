import inspect
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer, train_tokenizer

TEXT = inspect.getsource(inspect)
TRICKY = [
    "",
    "<s>a</s><pad><unk>",
    "<0x41>",
    "a\x00b",
    "\t\t x",
    "a\r\nb",
    "  a  ",
    "\u2581",
    "a\u2581\u2581b ",
    "\ufeffx",
    "\n\n\n",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    train_tokenizer([TEXT], 400, path, request.param)
    return Tokenizer(path)


def assert_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {PAD_ID, EOS_ID, BOS_ID, UNK_ID} & set(ids)


def test_encodes_a_document_as_its_lines(trained: Tokenizer) -> None:
    """What SentencePiece says of each line, with the newline's own piece between."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    expected = [processor.encode(line) for line in TEXT.split("\n")]
    newline = processor.piece_to_id("\n")
    assert trained.encode(TEXT) == [token for line in expected for token in [newline, *line]][1:]
    if "bpe" in str(trained.path):
        assert trained.encode(TEXT) == processor.encode(TEXT)
    else:
        scores = [processor.get_score(token) * 1024 for token in range(trained.vocab_size)]
        assert all(score == round(score) for score in scores), "sums of scores must be exact in fp32"


@pytest.mark.parametrize("text", TRICKY)
def test_gives_awkward_texts_back(trained: Tokenizer, text: str) -> None:
    assert_lossless(trained, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \n\t\r\u2581<s>/0x4A", max_size=60))
def test_gives_any_text_back(trained: Tokenizer, text: str) -> None:
    assert_lossless(trained, text)


def test_ids_and_token_bytes(trained: Tokenizer) -> None:
    assert (trained.pad_id, trained.eos_id, trained.bos_id, trained.unk_id) == (0, 1, 2, 3)
    assert trained.vocab_size == len(trained.token_bytes) == 400
    assert trained.token_bytes[:4].tolist() == [0, 0, 0, 0]
    assert trained.token_bytes[4:261].tolist() == [1] * 257  # newline and the bytes
    assert trained.decode([trained.bos_id, *trained.encode("text"), trained.eos_id, trained.pad_id]) == "text"
    assert trained.decode(trained.encode("\u4e2d")[:-1]).strip("\ufffd") == ""
    assert len(trained.encode("2026")) == 4
    assert len(trained.encode("    ")) == 1


def test_training_is_deterministic(trained: Tokenizer, tmp_path: Path) -> None:
    kind = "bpe" if "bpe" in str(trained.path) else "unigram"
    train_tokenizer(iter([TEXT]), 400, tmp_path / "elsewhere", kind)
    assert Tokenizer(tmp_path / "elsewhere").sha256 == trained.sha256


def test_trains_on_lines_longer_than_sentencepiece_takes(tmp_path: Path) -> None:
    train_tokenizer([TEXT.replace("\n", "").replace(" ", "") * 3], 350, tmp_path / "model")
    assert_lossless(Tokenizer(tmp_path / "model"), "x" * 70_000)


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([TEXT], 100, r"train:100:bpe.*choose another size"),
        (["ab"], 4096, r"too high.*choose another size"),
        ([], 300, "no text"),
    ],
)
def test_refuses_texts_that_do_not_support_the_vocabulary(
    tmp_path: Path, texts: list[str], size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, size, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("document 7 is bad"), KeyboardInterrupt("stop")])
def test_what_the_texts_raise_comes_through(tmp_path: Path, error: BaseException) -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise error

    with pytest.raises(type(error), match=str(error)):
        train_tokenizer(texts(), 400, tmp_path / "model")


def foreign_model(directory: Path, **options: object) -> Path:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=buffer, vocab_size=500, minloglevel=2, **options
    )
    path = directory / "foreign.model"
    path.write_bytes(buffer.getvalue())
    return path


def test_refuses_a_lossy_model(tmp_path: Path) -> None:
    path = foreign_model(tmp_path, pad_id=3)
    with pytest.raises(ValueError, match=r"foreign\.model does not give texts back exactly.*identity normalisation"):
        Tokenizer(path)


def test_refuses_a_model_without_pad(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no pad piece"):
        Tokenizer(foreign_model(tmp_path))


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: value .*missing\.model.*No such file.*train:VOCAB"):
        Tokenizer(tmp_path / "missing.model")
    (tmp_path / "json.model").write_text(json.dumps({"model": {}}))
    with pytest.raises(ValueError, match=r"json\.model \(not a SentencePiece model\)"):
        Tokenizer(tmp_path / "json.model")
