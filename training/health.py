"""Steps that would harm the weights: found before the update, left out, and if need be undone.

A step whose loss or gradient norm is not finite is never made. A spike is a step whose loss, or the logarithm of whose
gradient norm, lies more than `spike_score` robust standard deviations above the median of the last `spike_window` steps
made: with the median absolute deviation in place of the standard deviation, earlier spikes do not hide later ones.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

MAD_TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

LEAST_LOSS_DEVIATION = 0.01
"""Relative to the median loss: a run whose loss varies less is not judged by so little."""

LEAST_NORM_DEVIATION = 0.05
"""The same of the logarithm of the gradient norm."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """
    Attributes:
        on_spike: what is done about a spike: `log` tells of it, `skip` leaves the step out, `rollback` goes back to the
            last checkpoint besides.
        spike_score: see above.
        spike_window: steps made that the median is taken of; until a quarter as many are known, nothing is a spike.
        max_skipped: steps left out in a row, for spikes or for what is not finite, after which the run goes back to the
            last checkpoint.
        skip_around: batches on either side of a step left out that are left out with it once the run goes back.
        max_rollbacks: how often a run goes back before it ends with an error.
        hang_factor: a step that takes so many times the median ends the job; null: none does.
        hang_minutes: a step that takes less never does.
        slow_factor: a rank that takes so many times the median of all ranks for its own work is named in the log.
    """

    on_spike: Literal["log", "skip", "rollback"] = "log"
    spike_score: float = 10.0
    spike_window: int = 128
    max_skipped: int = 3
    skip_around: int = 0
    max_rollbacks: int = 5
    hang_factor: float | None = 20.0
    hang_minutes: float = 10.0
    slow_factor: float = 1.5

    def __post_init__(self) -> None:
        for key, least in (("spike_window", 4), ("max_skipped", 1), ("skip_around", 0), ("max_rollbacks", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}; must be at least {least}")
        for key, bound in (("spike_score", 0.0), ("hang_factor", 1.0), ("hang_minutes", 0.0), ("slow_factor", 1.0)):
            value = getattr(self, key)
            if value is not None and value <= bound:
                raise ValueError(f"{key}: {value}; must be more than {bound:g}")


class Health:
    """Judges steps by loss and gradient norm, the same on every rank, as all see the same figures.

    Args:
        config: limits and reactions.
        state: what `state` gave when the checkpoint was saved from which the run continues.

    Attributes:
        left_out: (first, last) sample of each step left out since the last one made.
        rollbacks: how often the run went back.
    """

    def __init__(self, config: HealthConfig, state: dict[str, Any] | None = None) -> None:
        self._config = config
        self.rollbacks = 0
        self._restore(state or {})

    def _restore(self, state: dict[str, Any]) -> None:
        window = self._config.spike_window
        self._losses = deque[float](state.get("losses", ()), maxlen=window)
        self._norms = deque[float](state.get("log_norms", ()), maxlen=window)
        self.left_out = tuple((int(first), int(last)) for first, last in state.get("left_out", ()))
        self.rollbacks = max(self.rollbacks, int(state.get("rollbacks", 0)))

    def state(self) -> dict[str, Any]:
        """All that judgements depend on, as JSON."""
        return {
            "losses": list(self._losses),
            "log_norms": list(self._norms),
            "left_out": [list(samples) for samples in self.left_out],
            "rollbacks": self.rollbacks,
        }

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, None if nothing is."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"not finite: loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        scores = {
            "loss": self._score(loss, self._losses, lambda median: LEAST_LOSS_DEVIATION * max(abs(median), 1e-6)),
            "gradient norm": self._score(_log(grad_norm), self._norms, lambda median: LEAST_NORM_DEVIATION),
        }
        for name, score in scores.items():
            if score > self._config.spike_score:
                return f"spike of the {name}: loss {loss:.4g}, gradient norm {grad_norm:.4g}, score {score:.1f}"
        return None

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether the update may be made."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        return self._config.on_spike == "log" or self.problem(loss, grad_norm) is None

    def made(self, loss: float, grad_norm: float) -> None:
        """The update was made."""
        self._losses.append(loss)
        self._norms.append(_log(grad_norm))
        self.left_out = ()

    def not_made(self, loss: float, grad_norm: float, samples: tuple[int, int]) -> bool:
        """The update from the samples first to last was not made. Returns whether the run is to go back."""
        self.left_out = (*self.left_out, samples)
        spike = math.isfinite(loss) and math.isfinite(grad_norm)
        return len(self.left_out) >= self._config.max_skipped or (spike and self._config.on_spike == "rollback")

    @property
    def may_go_back(self) -> bool:
        return self.rollbacks < self._config.max_rollbacks

    def went_back(self, state: dict[str, Any]) -> None:
        """The run continues from a checkpoint that holds `state`."""
        self.rollbacks += 1
        self._restore(state | {"left_out": ()})

    def _score(self, value: float, earlier: deque[float], least_deviation: Callable[[float], float]) -> float:
        """Robust standard deviations above the median, 0 where too little is known."""
        if len(earlier) < max(4, self._config.spike_window // 4):
            return 0.0
        median = statistics.median(earlier)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(other - median) for other in earlier)
        return (value - median) / max(deviation, least_deviation(median))


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))  # a batch without targets has none
