"""The generated tasks of `data.synthetic`, asked of a model at lengths of one's choosing.

They are made of token numbers, so that they suit models that were trained on them (`data.source: synthetic:NAME`), text
or none. `passkey` and `needle`, which a text model can be asked in words, stand in `retrieval.py`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, ClassVar

import numpy as np

from data.synthetic import TASKS as GENERATED
from data.synthetic import GeneratedTask, row_generator, stream_key
from eval.model import EvalModel, Row, Scores


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What the generated tasks have in common; their own settings are those of `data.options`.

    Metrics: `accuracy`, the share of targets that the model finds most likely; `rows_right`, of rows whose targets it
    all does; `accuracy_T` for each length. Where the beginning of a row is a shorter row (state tracking) one row asks
    for all lengths, and `accuracy_T` is of the targets beyond the length before.

    Attributes:
        lengths: tokens of a row.
        rows: of each length.
        seed: of the rows, whose stream is no run's.
    """

    generates: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    name: ClassVar[str]
    kind: ClassVar[type[Any]]

    lengths: tuple[int, ...] = (64, 128, 256, 512)
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self.lengths, rows=self.rows)

    def task(self) -> GeneratedTask:
        return of_same_settings(self.kind, self)

    def check(self, vocab_size: int, longest: int | None) -> None:
        check_generated(self.task(), self.lengths, vocab_size, longest)

    def drawn(self) -> tuple[int, ...]:
        """The lengths of which rows are drawn."""
        return (max(self.lengths),) if self.kind.prefix_closed else self.lengths

    def examples(self, model: EvalModel) -> Sequence[Row]:
        """`rows` rows of each length drawn, in their order."""
        task, found = self.task(), []
        for length in self.drawn():
            key = stream_key(f"eval/{self.name}/{length}/{self.seed}")
            for number in range(self.rows):
                found.append(Row(*task.row(row_generator(key, number), length, model.vocab_size)))
        return found

    def evaluate(self, model: EvalModel) -> dict[str, Any]:
        rows = self.examples(model)
        scores = model.score(rows)
        asked = [row.labels >= 0 for row in rows]
        shares = np.array([score.hit[targets].mean() for score, targets in zip(scores, asked) if targets.any()])
        metrics: dict[str, Any] = {
            "accuracy": _accuracy(scores, asked),
            "accuracy_stderr": float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else 0.0,
            "rows_right": float((shares == 1).mean()),
        }
        for length, of_length, targets in self._by_length(scores, asked):
            if any(mask.any() for mask in targets):
                metrics[f"accuracy_{length}"] = _accuracy(of_length, targets)
        return metrics | {"rows": len(rows), "targets": int(sum(mask.sum() for mask in asked))}

    def _by_length(
        self, scores: list[Scores], asked: list[np.ndarray]
    ) -> Iterator[tuple[int, list[Scores], list[np.ndarray]]]:
        """Each length, the scores of its rows and which of their labels count for it."""
        if not self.kind.prefix_closed:
            for number, length in enumerate(self.lengths):
                here = slice(number * self.rows, (number + 1) * self.rows)
                yield length, scores[here], asked[here]
            return
        first = 0
        for length in sorted(self.lengths):
            within = np.arange(max(self.lengths))
            yield length, scores, [mask & (first <= within) & (within < length) for mask in asked]
            first = length


def _accuracy(scores: Sequence[Scores], asked: Sequence[np.ndarray]) -> float:
    return float(np.concatenate([score.hit[mask] for score, mask in zip(scores, asked)]).mean())


def of_same_settings(kind: type[Any], task: Any) -> Any:
    """The generator `kind` with those settings of an evaluation task that it has."""
    return kind(**{field.name: getattr(task, field.name) for field in dataclasses.fields(kind)})


def check_counts(lengths: Sequence[int], **counts: int) -> None:
    """Raises ValueError unless there are lengths, each once, and all are positive."""
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths: {lengths}; must name lengths of at least 1 token, each once")
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"{key}: {value}; must be at least 1")


def check_generated(task: GeneratedTask, lengths: Sequence[int], vocab_size: int, longest: int | None) -> None:
    """Raises ValueError, with the keys of an evaluation task, where rows do not exist or cannot be asked."""
    if longest is not None and max(lengths) > longest:
        raise ValueError(
            f"lengths: {tuple(lengths)}; must be at most {longest} here; name shorter ones, or in a run's loop raise "
            "eval.tasks_length"
        )
    try:
        for length in lengths:
            task.check(length, vocab_size)
    except ValueError as error:  # which names the keys of a training run
        text = str(error).replace("data.sequence_length: ", "lengths: ").replace("data.options.", "")
        raise ValueError(text) from None


def generated_tasks() -> dict[str, type[Generated]]:
    """An evaluation task for each generator, with its settings and those of `Generated`."""
    return {
        name: make_dataclass(
            kind.__name__,
            [(field.name, field.type, field) for field in dataclasses.fields(kind)],
            bases=(Generated,),
            namespace={"__doc__": kind.__doc__, "name": name, "kind": kind},
            frozen=True,
            kw_only=True,
        )
        for name, kind in GENERATED.items()
        if name not in ("passkey", "needle")
    }
