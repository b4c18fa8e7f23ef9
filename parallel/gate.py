"""A last question before an optimizer updates anything, the same for every precision, ZeRO stage and engine.

DeepSpeed reduces gradients, measures their norm, clips, and calls the optimizer it was given, once for each part of the
state that it cut up. The question is asked in that call, once a step, when loss and norm are known; where the answer is
no, the parts are left as they are, and DeepSpeed clears the gradients as after any step.
"""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class UpdateGate:
    """Stands in front of `optimizer.step`; open until `expect` is called.

    Attributes:
        passed: whether the optimizer was let through since the last `expect`; False also where it was never called, as
            when DeepSpeed drops a gradient whose norm is not finite.
        asked: whether it was called at all since then.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._update = optimizer.step
        self._question: Callable[[], bool] | None = None
        self.passed = self.asked = False
        optimizer.step = self._step  # type: ignore[method-assign]

    def expect(self, question: Callable[[], bool]) -> None:
        """Has the next step ask `question`, which may communicate and must have one answer on all ranks."""
        self._question = question
        self.passed = self.asked = False

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self._question is not None and not self.asked:
            self.asked = True
            self.passed = self._question()
        if self._question is None or self.passed:
            return self._update(*args, **kwargs)
        return None
