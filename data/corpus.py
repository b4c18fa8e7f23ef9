"""A prepared directory or a foreign .bin/.idx pair, opened and checked against the run that wants it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.config import DataConfig
from data.indexed import IndexedDataset
from data.plan import read_meta
from data.synthetic import find_task
from data.tokenizer import Tokenizer

Split = Literal["train", "valid"]
PADDINGS = (1, 64, 128, 256, 512, 1024)  # multiples to which an embedding is commonly rounded up
SAMPLED_TOKENS = 1 << 20
SWEPT = 1 << 24  # sequences of an index that a start looks at: a second, however large the corpus


@dataclass(frozen=True)
class Corpus:
    """One split of a corpus; `key` is where the configuration names it.

    The tokenizer's path, digest and vocabulary are None for a foreign pair, which does not tell.
    """

    key: str
    path: str
    dataset: IndexedDataset
    tokenizer_path: Path | None = None
    tokenizer_sha256: str | None = None
    vocab_size: int | None = None


def open_train(config: DataConfig) -> list[Corpus]:
    """The training split of every corpus; raises ValueError if one is missing, damaged or shorter than a row."""
    corpora = [_open(f"data.corpora.{index}.path", corpus.path, "train") for index, corpus in enumerate(config.corpora)]
    for corpus in corpora:
        if config.sequence_length >= corpus.dataset.num_tokens:
            raise ValueError(
                f"data.sequence_length: value {config.sequence_length}; must be below the {corpus.dataset.num_tokens} "
                f"tokens of {corpus.path}; lower it or prepare more text"
            )
    return corpora


def open_valid(config: DataConfig) -> list[Corpus]:
    """The held-out data; raises ValueError if there is none or some is missing or damaged."""
    if config.validation is not None:
        corpora = [_open(f"data.validation.{index}", path, None) for index, path in enumerate(config.validation)]
    else:
        corpora = [
            _open(f"data.corpora.{index}.path", corpus.path, "valid") for index, corpus in enumerate(config.corpora)
        ]
    for corpus in corpora:
        if corpus.dataset.num_tokens < 2:
            raise ValueError(
                f"{corpus.key}: value {corpus.path} has no held-out text; validation needs some; "
                "prepare it with a larger --valid-fraction, or name other data in data.validation"
            )
    return corpora


def check_data(config: DataConfig, vocab_size: int, *, validation: bool = True, sweep: bool = True) -> Path | None:
    """Checks all corpora against each other, the tokenizer and the model's vocabulary, before anything is built.

    Returns the tokenizer's path; None if the data are generated, or if all corpora are foreign
    and data.tokenizer is not set. `validation=False` for a run that never validates, `sweep=False`
    where another rank sweeps over the indices (`IndexedDataset.verify`). Raises ValueError.
    """
    if config.source is not None:
        find_task(config.source, config.options).check(config.sequence_length, vocab_size)
        return None
    corpora = open_train(config) + (open_valid(config) if validation else [])
    for corpus in corpora if sweep else ():
        with _named(corpus.key, corpus.path):
            corpus.dataset.verify(limit=SWEPT)
    tokenizer = _common_tokenizer(config, corpora)
    if tokenizer is not None:
        _check_vocabulary(tokenizer, vocab_size)
    for corpus in corpora:
        bound = tokenizer.vocab_size if tokenizer is not None else vocab_size
        check_ids(corpus.path, corpus.dataset.tokens(0, SAMPLED_TOKENS), bound)
    return None if tokenizer is None else tokenizer.path


def check_ids(path: str, ids: np.ndarray, vocab_size: int | None) -> None:
    """Raises ValueError if a token id lies outside the vocabulary; its size may be unknown."""
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
        raise ValueError(
            f"{path}: holds the token id {smallest if smallest < 0 else largest}; ids must be from 0 to below the "
            f"vocabulary of {vocab_size}; set model.vocab_size and data.tokenizer to what the corpus was made with"
        )


def _open(key: str, path: str, split: Split | None) -> Corpus:
    """Opens a split of a prepared directory, or a pair; for a directory, no split means its held-out one."""
    directory = Path(path)
    if (directory / "meta.json").is_file():
        with _named(key, path):
            return _open_prepared(key, directory, split or "valid")
    if not Path(f"{path}.idx").is_file() and not Path(f"{path}.bin").is_file():
        unfinished = (directory / ".parts").is_dir()
        raise ValueError(
            f"{key}: value {path}; must be a directory with a meta.json, as python -m data.prepare writes it, or the "
            "prefix of a .bin/.idx pair; "
            + ("its preparation is unfinished: run that command again" if unfinished else "prepare it or give its path")
        )
    if split == "valid":
        raise ValueError(
            f"{key}: value {path} is a .bin/.idx pair, which has no held-out split; validation needs one; "
            "name held-out data in data.validation"
        )
    with _named(key, path):
        dataset = IndexedDataset(path)
    if dataset.num_tokens == 0:
        raise ValueError(f"{key}: value {path} holds no tokens; must hold some; give another pair")
    return Corpus(key, path, dataset)


@contextmanager
def _named(key: str, path: str) -> Iterator[None]:
    """Puts the configuration's key and value before the message of a ValueError, which names a file alone."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: value {path}; {error}") from error


def _open_prepared(key: str, directory: Path, split: Split) -> Corpus:
    meta = read_meta(directory)
    dataset = IndexedDataset(directory / split)
    if dataset.num_tokens != meta["splits"][split]["tokens"]:
        raise ValueError(
            f"{dataset.bin_path}: {dataset.num_tokens} tokens; meta.json counts {meta['splits'][split]['tokens']}; "
            "all files of a corpus must come from one preparation; prepare it again"
        )
    path, expected = directory / meta["tokenizer"]["file"], meta["tokenizer"]["sha256"]
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    if found != expected:
        raise ValueError(
            f"{path}: sha256 {found[:16]}, meta.json names {expected[:16]}; the tokenizer must be the one the corpus "
            "was made with; put it back or prepare the corpus again"
        )
    return Corpus(key, str(directory), dataset, path, expected, meta["tokenizer"]["vocab_size"])


def _common_tokenizer(config: DataConfig, corpora: list[Corpus]) -> Tokenizer | None:
    chosen = None if config.tokenizer is None else Tokenizer(config.tokenizer)
    owner = f"data.tokenizer ({config.tokenizer})"
    for corpus in corpora:
        if corpus.tokenizer_path is None or corpus.tokenizer_sha256 is None:
            continue
        if chosen is None:
            chosen, owner = Tokenizer(corpus.tokenizer_path), corpus.path
        elif corpus.tokenizer_sha256 != chosen.sha256:
            raise ValueError(
                f"{corpus.key}: value {corpus.path} was made with tokenizer {corpus.tokenizer_sha256[:16]}, "
                f"{owner} is {chosen.sha256[:16]}; one run must have one tokenizer; "
                f"prepare {corpus.path} with --tokenizer {chosen.path}"
            )
    return chosen


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    allowed = sorted({-(-tokenizer.vocab_size // multiple) * multiple for multiple in PADDINGS})
    if vocab_size not in allowed:
        raise ValueError(
            f"model.vocab_size: value {vocab_size}; must be the {tokenizer.vocab_size} of {tokenizer.path}, as it is "
            f"or padded for the hardware ({', '.join(map(str, allowed))}); set it to {tokenizer.vocab_size}"
        )
