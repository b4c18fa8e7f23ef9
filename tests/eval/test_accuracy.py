"""Accuracy against a count by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.loader import Batch
from data.synthetic import NO_TARGET
from eval.accuracy import accuracy


class Echo:
    """Takes each input to be its own successor."""

    embed = SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.one_hot(input_ids, 9).float(), None


def batch(ids: list[int], labels: list[int]) -> Batch:
    return Batch(torch.tensor([ids]), torch.tensor([labels]), torch.arange(len(ids))[None])


def test_counts_targets_alone() -> None:
    echo: Any = Echo()
    batches = [batch([1, 2, 3], [1, NO_TARGET, 4]), batch([5, 6, 7], [NO_TARGET, 6, 7])]
    assert accuracy(echo, batches) == 3 / 4
    with pytest.raises(ValueError, match="no target token"):
        accuracy(echo, [batch([1], [NO_TARGET])])
