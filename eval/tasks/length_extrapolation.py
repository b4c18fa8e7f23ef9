"""Perplexity beyond the length that a model was trained at."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from data.synthetic import NO_TARGET
from eval.model import EvalModel, Row
from eval.tasks.bits_per_byte import BitsPerByte
from eval.validate import position_buckets


class Stretch(NamedTuple):
    """Consecutive tokens as one long row, and as windows that begin afresh: (row, first position it asks for)."""

    whole: Row
    windows: list[tuple[Row, int]]


@dataclass(frozen=True, kw_only=True)
class LengthExtrapolation:
    """The loss at every position of long rows, beside that of the same tokens with no more context than in training.

    A state that collapses beyond the trained length shows as `excess`, the nats a token by which the long context is
    worse than a window of the trained length that begins afresh; a state that still serves there has an excess below 0.
    As both judge the same tokens, the difficulty of the text at a position does not matter.

    Metrics: `excess` and `excess_at_end` (of the last bucket of positions), `loss_within` and `loss_beyond` the trained
    length, `loss_of_windows` for the tokens beyond, and `loss_by_position`, a list of
    [first, last + 1, nats, nats in windows or null].

    Attributes:
        path: a text file, or a directory whose files follow one another, as in `bits_per_byte`.
        suffix: of the files of a directory.
        trained_length: `data.sequence_length` of the run.
        length: of a row.
        rows: at most so many, from the beginning of the text on; the last part that fills no row is left out.
    """

    generates: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True

    path: str
    suffix: str = ".txt"
    trained_length: int
    length: int
    rows: int = 8

    def __post_init__(self) -> None:
        if self.trained_length < 2:
            raise ValueError(f"trained_length: {self.trained_length}; must be at least 2")
        if self.length <= self.trained_length:
            raise ValueError(f"length: {self.length}; must exceed trained_length ({self.trained_length}); raise it")
        if self.rows < 1:
            raise ValueError(f"rows: {self.rows}; must be at least 1")

    def check(self, vocab_size: int, longest: int | None) -> None:
        if longest is not None and self.length > longest:
            raise ValueError(
                f"length: {self.length}; must be at most {longest} here; shorten it, or in a run's loop raise "
                "eval.tasks_length"
            )
        self._text().check(vocab_size, longest)

    def _text(self) -> BitsPerByte:
        return BitsPerByte(path=self.path, suffix=self.suffix)

    def examples(self, model: EvalModel) -> list[Stretch]:
        tokenizer = model.tokenizer
        tokens: list[int] = []
        for text in self._text().texts():
            tokens += tokenizer.encode(text)
            if len(tokens) >= self.rows * self.length:
                break
        count = min(self.rows, len(tokens) // self.length)
        if not count:
            raise ValueError(f"length: {self.length}; {self.path!r} has {len(tokens)} tokens; shorten it or add text")
        parts = [tokens[n * self.length : (n + 1) * self.length] for n in range(count)]
        return [self._stretch(np.array(part, dtype=np.int64), tokenizer.bos_id) for part in parts]

    def _stretch(self, tokens: np.ndarray, bos_id: int) -> Stretch:
        """Every token beyond the trained length is asked for in the window in which it has the most context, at least
        half a window."""
        stride = self.trained_length - self.trained_length // 2
        windows = []
        for first in range(self.trained_length, self.length, stride):
            start, stop = first - self.trained_length // 2, min(first + stride, self.length)
            row = _row(tokens[start:stop], bos_id)
            row.labels[: first - start] = NO_TARGET
            windows.append((row, first))
        return Stretch(_row(tokens, bos_id), windows)

    def evaluate(self, model: EvalModel) -> dict[str, Any]:
        stretches = self.examples(model)
        scores = iter(model.score([row for one in stretches for row in (one.whole, *(row for row, _ in one.windows))]))
        whole, fresh = np.zeros((2, self.length))
        for stretch in stretches:
            whole += next(scores).nll
            for row, first in stretch.windows:
                nll = next(scores).nll[row.labels >= 0]
                fresh[first : first + len(nll)] += nll
        whole, fresh = whole / len(stretches), fresh / len(stretches)
        trained = self.trained_length
        buckets = []
        borders = sorted({*position_buckets(self.length), trained})
        for first, stop in zip(borders, borders[1:]):
            in_windows = float(fresh[first:stop].mean()) if first >= trained else None
            buckets.append([first, stop, float(whole[first:stop].mean()), in_windows])
        return {
            "excess": float((whole - fresh)[trained:].mean()),
            "excess_at_end": buckets[-1][2] - buckets[-1][3],  # type: ignore[operator]
            "loss_within": float(whole[:trained].mean()),
            "loss_beyond": float(whole[trained:].mean()),
            "loss_of_windows": float(fresh[trained:].mean()),
            "rows": len(stretches),
            "loss_by_position": buckets,
        }


def _row(tokens: np.ndarray, bos_id: int) -> Row:
    """All tokens asked for, after BOS."""
    return Row(np.concatenate([[bos_id], tokens[:-1]]), tokens.copy())
