"""What somebody else made runs no code when it is read: a pickle, or a YAML tag, in each place where one could be.

Checkpoints have theirs in `models/test_checkpoint.py` and `parallel/test_checkpoint.py`, Hugging Face directories in
`models/test_hf_import_errors.py` and `eval/test_model.py`.
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data.prepare
from configs.schema import ConfigError, load_config
from data.config import CorpusConfig, DataConfig
from data.corpus import check_data
from data.loader import Loader, validation_batches
from data.plan import FILES
from data.tokenizer import Tokenizer

ASSETS = Path(__file__).resolve().parent / "assets"
TEXTS = [f"{number} bottles of beer on the wall, {number} bottles of beer. " * 8 for number in range(24)]


class Intruder:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What a planted pickle leaves when it is read."""
    return tmp_path / "trace"


def planted(trace: Path) -> list[bytes]:
    """A pickle as `pickle`, as torch and as numpy write it."""
    as_torch = io.BytesIO()
    torch.save(Intruder(trace), as_torch)
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    described = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return [pickle.dumps(Intruder(trace)), as_torch.getvalue(), header + described + pickle.dumps([Intruder(trace)])]


def test_what_is_planted_runs_where_it_is_read_carelessly(trace: Path) -> None:
    readers = (
        pickle.loads,
        lambda content: torch.load(io.BytesIO(content), weights_only=False),
        lambda content: np.load(io.BytesIO(content), allow_pickle=True),
    )
    for content, read in zip(planted(trace), readers, strict=True):
        read(content)
        trace.rmdir()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    source = directory / "bottles.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    arguments = ["--input", str(source), "--tokenizer", str(ASSETS / "tokenizer.model"), "--valid-fraction", "0.2"]
    assert data.prepare.main([*arguments, "--output", str(directory / "corpus")]) == 0
    return directory / "corpus"


def read_corpus(path: Path) -> int:
    """Everything that training reads of a corpus; the number of validation batches."""
    config = DataConfig(corpora=(CorpusConfig(path=str(path)),), sequence_length=16, prefetch=0)
    share = {"micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "vocab_size": 400}
    check_data(config, 400)
    loader = Loader(config, split="train", batch_size=2, **share)
    list(itertools.islice(loader.batches(0), 4))
    return len(list(validation_batches(config, max_sequences=4, **share)))


@pytest.mark.parametrize("name", FILES)
def test_a_corpus_runs_nothing(corpus: Path, tmp_path: Path, trace: Path, name: str) -> None:
    assert read_corpus(corpus) == 2
    for content in planted(trace):
        path = shutil.copytree(corpus, tmp_path / "copy")
        size = (path / name).stat().st_size
        for bytes_of_file in (content, content[:size].ljust(size, b"\0")):  # also where only the size is looked at
            (path / name).write_bytes(bytes_of_file)
            with contextlib.suppress(ValueError):
                read_corpus(path)
        shutil.rmtree(path)
    assert not trace.exists()


def test_a_tokenizer_and_texts_run_nothing(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, ending in itertools.product(planted(trace), ("jsonl", "txt", "jsonl.gz", "parquet")):
        source, output = tmp_path / f"texts.{ending}", tmp_path / "output"
        source.write_bytes(content)
        tokenizer = ["--tokenizer", str(ASSETS / "tokenizer.model")]
        data.prepare.main(["--input", str(source), *tokenizer, "--output", str(output), "--workers", "1"])
        shutil.rmtree(output, ignore_errors=True)
        assert "Traceback" not in capsys.readouterr().err
    for content in planted(trace):
        (tmp_path / "some.model").write_bytes(content)
        with pytest.raises(ValueError, match="not a SentencePiece model"):
            Tokenizer(tmp_path / "some.model")
    assert not trace.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os"])
def test_a_configuration_runs_nothing(tmp_path: Path, trace: Path, tag: str) -> None:
    """As the one in a run directory, which is read whenever the run is continued."""
    path = tmp_path / "config.yaml"
    path.write_text(
        (ASSETS / "tiny.yaml").read_text(encoding="utf-8") + f"\nplanted: {tag} [{trace}]\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"config.yaml: line \d+: could not determine a constructor for the tag"):
        load_config(path)
    assert not trace.exists()
