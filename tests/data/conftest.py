import argparse
import inspect
import json
import subprocess
from pathlib import Path

import pytest

from data.parts import Settings
from data.prepare import Training, main, prepare
from data.tokenizer import SPACE_MARK, Tokenizer, train_tokenizer
from tests.data.preparing import arguments

TEXTS = [
    piece
    for module in (argparse, inspect, json, subprocess)
    for piece in inspect.getsource(module).split("\n\n\n")
    if piece
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    train_tokenizer(TEXTS, 400, path)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of JSON-lines files, the documents of TEXTS dealt out to them."""
    directory = tmp_path_factory.mktemp("texts")
    for index in range(3):
        lines = [json.dumps({"text": text}) for text in TEXTS[index::3]]
        (directory / f"{index}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture(scope="session")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of TEXTS, a fifth of it held out."""
    output = tmp_path_factory.mktemp("corpus") / "prepared"
    prepare([f"{texts}/*.jsonl"], Training(400, "bpe"), output, Settings(valid_fraction=0.2), workers=1)
    return output


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that make four parts: one for each large file, the small ones with the last."""
    directory = tmp_path_factory.mktemp("inputs")
    source = inspect.getsource(argparse)
    for index in range(4):
        lines = [json.dumps({"text": f"{index} {row} {source[row * 80 : row * 80 + 2000]}"}) for row in range(300)]
        (directory / f"{index}.jsonl").write_text("\n".join(lines))
    for index in range(5):
        (directory / f"small{index}.txt").write_text(f"small {index}\n{SPACE_MARK}\t\x00\r\n")
    return directory


@pytest.fixture(scope="session")
def expected(inputs: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus made in one go by one process."""
    output = tmp_path_factory.mktemp("expected") / "corpus"
    assert main(arguments(inputs, output, tokenizer, "--workers", "1")) == 0
    return output
