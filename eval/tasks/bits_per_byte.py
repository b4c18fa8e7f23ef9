"""How well a model compresses local text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from eval.model import EvalModel, Row, continuation, windows


class Document(NamedTuple):
    """A text as the rows that ask for all its tokens, and its length in bytes."""

    rows: tuple[Row, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """The summed negative log likelihood of a document's tokens, EOS excluded, over its UTF-8 bytes.

    A document of any length is one row, read through the state; where a model's rows have a limit it is cut into as
    many as it takes, each of which starts afresh.

    Attributes:
        path: a text file, or a directory whose files, in the order of their names, are documents.
        suffix: of the files of a directory.
        separator: what ends a document inside a file, as it stands there; by default a file is one document.
    """

    generates: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True

    path: str
    suffix: str = ".txt"
    separator: str | None = None

    def check(self, vocab_size: int, longest: int | None) -> None:
        if self.separator == "":
            raise ValueError("separator: ''; must hold a character; leave it out to read a file as one document")
        if not self._files():
            raise ValueError(f"path: {self.path!r}; must be a file, or a directory of files *{self.suffix}")

    def _files(self) -> list[Path]:
        path = Path(self.path)
        return sorted(path.rglob(f"*{self.suffix}")) if path.is_dir() else [path] if path.is_file() else []

    def texts(self) -> list[str]:
        """The documents, without those that are empty."""
        found = []
        for file in self._files():
            try:
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"path: {file}; must be UTF-8 ({error.reason} at byte {error.start})") from None
            found += [text] if self.separator is None else text.split(self.separator)
        return [text for text in found if text]

    def examples(self, model: EvalModel) -> Sequence[Document]:
        tokenizer = model.tokenizer
        documents = []
        for text in self.texts():
            row = continuation([tokenizer.bos_id], tokenizer.encode(text))
            rows = (row,) if model.longest is None else tuple(windows(row, model.longest))
            documents.append(Document(rows, len(text.encode())))
        if not documents:
            raise ValueError(f"path: {self.path!r}; holds no text; name files with some")
        return documents

    def evaluate(self, model: EvalModel) -> dict[str, float]:
        documents = self.examples(model)
        scores = model.score([row for document in documents for row in document.rows])
        nats = sum(float(score.nll.sum()) for score in scores)
        num_bytes = sum(document.num_bytes for document in documents)
        tokens = sum(len(row.labels) for document in documents for row in document.rows)
        return {
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "loss": nats / tokens,
            "documents": len(documents),
            "bytes": num_bytes,
            "tokens": tokens,
        }
