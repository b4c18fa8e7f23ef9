"""SentencePiece tokenizers that give every text back exactly.

`train_tokenizer` makes one; `Tokenizer` loads one, ours or made elsewhere, and refuses a model that loses text by
construction (normalisation, a dummy prefix, no byte fallback). `data.prepare` still checks every document.
"""

import functools
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data.publish import publish

PAD_ID, EOS_ID, BOS_ID, UNK_ID = range(4)
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space; a literal one in a text would come back as a space
PROBE = f"  a\n\n\tb\r\n 2026 \u00bd \ufb01 \u4e2d\U0001f600{SPACE_MARK}\x00</s> "
# The trainer holds positions inside a word in 16 bits and skips sentences over 4192 bytes; longer lines are cut.
MAX_LINE_CHARACTERS = 1024


class Tokenizer:
    """A SentencePiece model with byte fallback and PAD, BOS and EOS pieces.

    Raises ValueError if `path` is no such model or does not give a probing text back exactly.

    A literal U+2581 is encoded as its three UTF-8 bytes, because as a piece it stands for a space.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            serialized = self.path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a SentencePiece model"
            raise ValueError(
                f"tokenizer: value {self.path} ({reason}); must be a SentencePiece .model file; "
                "give another path, or train one with `python -m data.prepare --tokenizer train:VOCAB`"
            ) from error
        self.sha256: str = hashlib.sha256(serialized).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        with_newline = [token for token in range(self.vocab_size) if "\n" in self._processor.id_to_piece(token)]
        alone = len(with_newline) == 1 and self._processor.id_to_piece(with_newline[0]) == "\n"
        self._newline_id = with_newline[0] if alone else None
        self._check()

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes of text each token stands for; 0 for PAD, BOS, EOS and UNK."""
        return np.array([self._piece_bytes(token) for token in range(self.vocab_size)], dtype=np.int64)

    def _piece_bytes(self, token: int) -> int:
        processor = self._processor
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            return 0
        if processor.is_byte(token):
            return 1
        return len(processor.id_to_piece(token).replace(SPACE_MARK, " ").encode())

    def _check(self) -> None:
        missing = [name for name in ("pad", "bos", "eos") if getattr(self, f"{name}_id") < 0]
        if missing:
            raise ValueError(
                f"tokenizer: value {self.path} has no {' and no '.join(missing)} piece; all three are needed; "
                "train one with `python -m data.prepare --tokenizer train:VOCAB`"
            )
        ids = self.encode(PROBE)
        if self.decode(ids) != PROBE or sum(map(self._piece_bytes, ids)) != len(PROBE.encode()):
            raise ValueError(
                f"tokenizer: value {self.path} does not give texts back exactly; must have identity normalisation, "
                "byte fallback, no dummy prefix and no whitespace removal; "
                "train one with `python -m data.prepare --tokenizer train:VOCAB`"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS and EOS; control pieces such as "<s>" in the text are plain characters."""
        if SPACE_MARK not in text:
            return self._encode_lines(text)
        first, *rest = (self._encode_lines(part) for part in text.split(SPACE_MARK))
        return list(itertools.chain(first, *((*self._space_mark_ids, *part) for part in rest)))

    def _encode_lines(self, text: str) -> list[int]:
        """Line by line where a newline is a piece of its own: a unigram model adds up fp32 scores along what it is
        given, and over a whole document their rounding would decide between equal splits."""
        if self._newline_id is None:
            return list(self._processor.encode(text))
        first, *rest = (self._processor.encode(line) for line in text.split("\n"))
        return list(itertools.chain(first, *((self._newline_id, *line) for line in rest)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; PAD, BOS and EOS stand for nothing, and bytes that are not UTF-8 decode to U+FFFD."""
        return str(self._processor.decode([int(i) for i in ids]))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | Path, kind: Literal["bpe", "unigram"] = "bpe"
) -> None:
    """Trains a lossless SentencePiece model on `texts` and writes it to `path`, unless that exists by then.

    The model depends on the texts, the size and the kind only, not on the machine's cores.
    Ids: PAD 0, EOS 1, BOS 2, UNK 3 (as in Gemma), newline 4, the 256 bytes 5 to 260.
    Raises ValueError if the texts are empty or do not support a vocabulary of that size.
    """
    model, lines = io.BytesIO(), _Lines(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            bos_id=BOS_ID,
            unk_id=UNK_ID,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            required_chars=SPACE_MARK,  # without a piece of its own a space would come back as U+2581
            user_defined_symbols=["\n"],
            num_threads=16,  # part of the result: partial sums are added in thread order, and the model stores it
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from None
        raise ValueError(
            f"tokenizer: value train:{vocab_size}:{kind}; the texts must support a vocabulary of that size "
            f"({_reason(error)}); choose another size or give more text"
        ) from error
    publish(Path(path), _with_exact_scores(model.getvalue()) if kind == "unigram" else model.getvalue())


def _with_exact_scores(serialized: bytes) -> bytes:
    """A unigram model whose scores are multiples of 2^-10, so that their sums along a line are exact in fp32 and every
    implementation finds the same best split."""
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(serialized)  # type: ignore[attr-defined]
    for piece in proto.pieces:
        piece.score = round(piece.score * 1024) / 1024
    return proto.SerializeToString()


class _Lines:
    """Lines without their newline, which is a piece of its own and never part of another.

    Keeps what the texts raise, an interrupt included, because SentencePiece turns it into an error of its own.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.split("\n"):
                    for start in range(0, len(line), MAX_LINE_CHARACTERS):
                        yield line[start : start + MAX_LINE_CHARACTERS]
        except (Exception, KeyboardInterrupt) as error:
            self.failure = error
            raise


def _reason(error: RuntimeError) -> str:
    """SentencePiece's message without the place in its source and the options that are not ours."""
    message = str(error).rsplit("] ", 1)[-1].partition(" Increase vocab_size")[0].strip().rstrip(".")
    return message or "there is no text to learn from"
