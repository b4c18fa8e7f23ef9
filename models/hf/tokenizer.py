"""SentencePiece models as tokenizers that transformers loads, equal in ids and text.

The pieces are carried over with plain spaces in place of SentencePiece's mark: nothing has to be replaced before
encoding or after decoding, and a mark that stands in a text is a character like any other.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sentencepiece import sentencepiece_model_pb2 as schema
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from data.tokenizer import SPACE_MARK, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


class Piece(NamedTuple):
    """One entry of the vocabulary; `text` with plain spaces."""

    text: str
    score: float
    kind: int


def convert_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The SentencePiece model at `path` as a transformers tokenizer.

    It puts BOS in front, as documents have it; with `add_special_tokens=False` its ids are those of `Tokenizer.encode`.
    Control pieces written out in a text, such as "<s>", are plain characters there and here. The ids of a unigram model
    are the same where sums of its scores along a line are exact in single precision: below 2^14, some 3,000 tokens, in
    one that `train_tokenizer` made. Beyond, rounding decides between segmentations that are equally good.

    Raises:
        ValueError: the model loses text (`Tokenizer`), or is of a kind that has no counterpart.
    """
    ours = Tokenizer(path)
    proto = schema.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    pieces = [Piece(piece.piece.replace(SPACE_MARK, " "), piece.score, piece.type) for piece in proto.pieces]
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE) or any(piece.kind == UNUSED for piece in pieces):
        raise ValueError(
            f"tokenizer: {path} has unused pieces or is neither BPE nor unigram, which transformers cannot express; "
            "train one with `python -m data.prepare --tokenizer train:VOCAB`"
        )
    unknown = pieces[ours.unk_id].text
    is_bpe = proto.trainer_spec.model_type == BPE
    fast = FastTokenizer(_bpe(pieces, unknown) if is_bpe else _unigram(pieces, ours.unk_id))
    if not is_bpe:
        fast.pre_tokenizer = _isolate_unknown_characters(pieces)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    begin = pieces[ours.bos_id].text
    fast.add_special_tokens([AddedToken(p.text, special=True) for p in pieces if p.kind in (CONTROL, UNKNOWN)])
    fast.add_tokens([AddedToken(p.text, normalized=False) for p in pieces if p.kind == USER_DEFINED])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, ours.bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=begin,
        eos_token=pieces[ours.eos_id].text,
        pad_token=pieces[ours.pad_id].text,
        unk_token=unknown,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "<s>" in a text stays text
    )


def _bpe(pieces: list[Piece], unknown: str) -> models.BPE:
    """SentencePiece merges any neighbours whose union is a piece, best score first and then from the left.

    Merges are pairs here, ranked by the piece they make; of one piece's pairs that with the longest left part comes
    first, as it stands further left where two of them overlap.
    """
    known = {piece.text for piece in pieces if piece.kind == NORMAL}
    merges = []
    for piece in sorted((p for p in pieces if p.kind == NORMAL), key=lambda p: -p.score):
        for cut in range(len(piece.text) - 1, 0, -1):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in known and right in known:
                merges.append((left, right))
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=False, byte_fallback=True)


def _unigram(pieces: list[Piece], unknown_id: int) -> models.Unigram:
    """The same scores; pieces that text must not match by their names get one that any spelling out beats."""
    out_of_reach = 100.0 * min(piece.score for piece in pieces if piece.kind == NORMAL)
    scored = [(p.text, p.score if p.kind in (NORMAL, USER_DEFINED) else out_of_reach) for p in pieces]
    return models.Unigram(scored, unk_id=unknown_id, byte_fallback=True)


def _isolate_unknown_characters(pieces: Iterable[Piece]) -> pre_tokenizers.PreTokenizer | None:
    """Cuts at those characters of "<0x0A>", "<s>" and their like that no piece holds.

    Spelling such a name out would cost more than the name itself then. Where no piece holds the character, a cut beside
    it changes nothing else.
    """
    pieces = list(pieces)
    spoken = {character for p in pieces if p.kind in (NORMAL, USER_DEFINED) for character in p.text}
    names = {character for p in pieces if p.kind not in (NORMAL, USER_DEFINED) for character in p.text}
    missing = "".join(sorted(names - spoken))
    return pre_tokenizers.Split(Regex(f"[{re.escape(missing)}]"), "isolated") if missing else None
