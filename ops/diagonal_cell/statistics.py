"""How a nonlinear recurrence was solved."""

from dataclasses import dataclass, field

from torch import Tensor

FIGURES = ("segments", "corrections", "residual", "sequential_channels")
"""Of a report, in its order; what they mean is told at the properties of `Statistics`."""
NUM_FIGURES = len(FIGURES)


@dataclass
class Statistics:
    """How the last call of an op that was given this object was solved.

    Filling it does not synchronise with the device; reading one of its figures does.

    Attributes:
        report: float64 [4] on the device of the call, FIGURES; None where the op has but one way to solve
            (`impl="reference"`).
    """

    report: Tensor | None = field(default=None, repr=False)

    def figures(self) -> dict[str, Tensor]:
        """By name, on the device; nothing where there is no report."""
        return {} if self.report is None else dict(zip(FIGURES, self.report.unbind()))

    @property
    def segments(self) -> int:
        """S; 1 is the plain sequential loop."""
        return 1 if self.report is None else int(self.report[0])

    @property
    def corrections(self) -> int:
        """Of the segments' start states, after the first sweep."""
        return 0 if self.report is None else int(self.report[1])

    @property
    def residual(self) -> float:
        """Largest error of a segment's start state, as estimated, among the channels that shooting solved."""
        return 0.0 if self.report is None else float(self.report[2])

    @property
    def sequential_channels(self) -> int:
        """(row, channel) pairs that were left to the sequential loop."""
        return 0 if self.report is None else int(self.report[3])
