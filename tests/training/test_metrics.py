"""What modules tell about their last call."""

import torch
from torch import Tensor, nn

from training.metrics import largest, module_metrics


class Told(nn.Module):
    def __init__(self, **figures: float) -> None:
        super().__init__()
        self.figures = figures

    def metrics(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.figures.items()}


def test_the_largest_of_all_modules_counts() -> None:
    model = nn.Sequential(
        Told(corrections=2.0, residual=1e-7),
        nn.Sequential(nn.Linear(2, 2), Told(corrections=1.0, residual=3e-7)),
        Told(),
    )
    assert module_metrics(model) == {"corrections": 2.0, "residual": 3e-7}


def test_nothing_to_tell() -> None:
    assert module_metrics(nn.Linear(2, 2)) == {}


def test_the_largest_figure_of_any_rank_counts():
    assert largest([{"residual": 1e-7, "corrections": 2.0}, {}, {"residual": 3e-7}]) == {
        "residual": 3e-7,
        "corrections": 2.0,
    }
