"""What a task is."""

from collections.abc import Sequence
from typing import Any, Protocol

from eval.model import EvalModel


class Task(Protocol):
    """A frozen dataclass whose fields are its settings.

    `evaluate` asks the model and nothing else: it runs alike in one process, on a class of transformers, and between
    two steps of a run whose ranks each hold a part of the model. There every rank calls it, with the same examples in
    the same order, so that whatever it draws comes from a seed among its settings.

    Attributes:
        generates: whether it continues prompts. On ranks that hold parts one runs only if it also has an attribute
            `greedy` that is true: it always takes the most likely token.
        reads_text: whether it needs the model's tokenizer.
    """

    @property
    def generates(self) -> bool: ...
    @property
    def reads_text(self) -> bool: ...

    def check(self, vocab_size: int, longest: int | None) -> None:
        """Raises ValueError, "setting: value; requirement; way out", for what cannot be: before a model is built.

        Args:
            vocab_size: tokens that the model knows.
            longest: the most tokens of a row, None where there is no limit.
        """
        ...

    def examples(self, model: EvalModel) -> Sequence[Any]:
        """What is asked, in the same order every time."""
        ...

    def evaluate(self, model: EvalModel) -> dict[str, Any]:
        """The metrics: numbers by name, and where a number is not enough (a heat map) lists of plain values.

        Raises:
            ValueError: an example cannot be asked, for example because it is longer than the model's rows may be.
        """
        ...
