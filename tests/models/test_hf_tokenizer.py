"""The converted tokenizer against SentencePiece: the same ids, and the same text back."""

import argparse
import inspect
import json
import random
import subprocess
from pathlib import Path

import pytest
import sentencepiece

from data.tokenizer import Tokenizer, train_tokenizer
from models.hf.tokenizer import convert_tokenizer

DOCUMENTS = [inspect.getsource(module) for module in (argparse, inspect, json, json.decoder, subprocess)]
UNITS = [
    *("a", "in", "self", "0", "12", "é", "e\u0301", "中", "😀", "ﬁ", "½", "\u2581", "\u00a0", "\u3000"),
    *(" ", "  ", "\t", "\n", "\n\n", "\r\n", "\x00", "-", "=", "_", "."),
    *("<s>", "</s>", "<pad>", "<unk>", "<0x0A>", "<0xFF>", "<0x"),
]


def mixtures(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(UNITS, k=rng.randrange(1, 60))) for _ in range(count)]


def runs(count: int) -> list[str]:
    """Runs of one character, where several segmentations are equally good."""
    rng = random.Random(1)
    run = [lambda c=c: c * rng.randrange(1, 40) for c in " -=_a#*.\n"]
    return ["".join(rng.choice(run)() for _ in range(3)) for _ in range(count)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / f"{request.param}.model"
    train_tokenizer(DOCUMENTS, 600, path, request.param)
    return path


@pytest.mark.parametrize("texts", [DOCUMENTS, mixtures(400), runs(400)], ids=["source", "mixtures", "runs"])
def test_ids_and_text_are_equal(model_file: Path, texts: list[str]) -> None:
    ours, theirs = Tokenizer(model_file), convert_tokenizer(model_file)
    assert len(theirs) == ours.vocab_size
    for text in texts:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text), repr(text)
        assert theirs.decode(ids) == text


def test_begin_and_end(model_file: Path) -> None:
    ours, theirs = Tokenizer(model_file), convert_tokenizer(model_file)
    assert theirs("a text").input_ids == [ours.bos_id, *ours.encode("a text")]
    assert theirs("").input_ids == [ours.bos_id]
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (ours.pad_id, ours.bos_id, ours.eos_id)
    whole = [ours.bos_id, *ours.encode("<s> a\n  text</s>"), ours.eos_id]
    assert theirs.decode(whole, skip_special_tokens=True) == ours.decode(whole) == "<s> a\n  text</s>"
    padded = theirs(["one", "one two three"], padding=True).input_ids
    assert padded[0][0] == ours.pad_id, "padding goes to the left, where generation can continue"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_names_of_pieces_that_the_vocabulary_cannot_spell(kind: str, tmp_path: Path) -> None:
    """No piece holds "<", "x" or a digit here, so the name "<0x0A>" is the only piece that would match them."""
    texts = ["while other pieces are made of words like these, text still holds brackets and numbers. "] * 30
    train_tokenizer(["".join(t) for t in texts], 290, tmp_path / "words.model", kind)
    ours, theirs = Tokenizer(tmp_path / "words.model"), convert_tokenizer(tmp_path / "words.model")
    for text in ("<0x0A>", "text <0x41><s>", "<unk></s><pad> words", "< 0x0A", "0x<x>"):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text


def test_a_kind_without_counterpart_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some characters"] * 10),
        model_prefix=str(tmp_path / "characters"),
        model_type="char",
        vocab_size=275,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=3,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="neither BPE nor unigram"):
        convert_tokenizer(tmp_path / "characters.model")
