"""Who is waited for."""

import time

import pytest
import torch
from torch import nn

from training.own_time import OwnTime, Stragglers


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


def test_forward_passes_of_training_and_what_is_added() -> None:
    module = Slow()
    own_time = OwnTime(module, torch.device("cpu"))
    for _ in range(2):  # steps of three microbatches
        own_time.add(0.1)
        for _ in range(3):
            module(torch.ones(1))
    module.eval()
    for _ in range(20):
        module(torch.ones(1))
    assert own_time.take() == pytest.approx(0.16, abs=0.05)
    assert own_time.take() == 0.0


def test_the_slowest_of_its_stage_is_named_once() -> None:
    stragglers = Stragglers(["a", "a", "b", "b", "c", "c"], slow_factor=1.5)
    stages = [0, 0, 0, 1, 1, 1]
    figures, slow = stragglers.compare([1.0, 1.0, 1.4, 3.0, 3.0, 3.1], stages)
    assert figures == {"own_time": 2.2, "own_time_max": 1.4, "slowest_rank": 2, "slowest_host": "b"}
    assert slow is None
    figures, slow = stragglers.compare([1.0, 1.0, 1.0, 3.0, 3.0, 6.0], stages)
    assert figures["slowest_rank"] == 5
    assert slow == "rank 5 on c takes 6.000 s a step for its own work, the median of 6 ranks is 3.000 s"
    assert stragglers.compare([1.0, 1.0, 1.0, 3.0, 3.0, 6.0], stages)[1] is None
    assert stragglers.compare([1.0, 1.0, 1.0, 3.0, 3.0, 3.0], stages)[1] is None
    assert stragglers.compare([1.0, 1.0, 1.0, 3.0, 3.0, 6.0], stages)[1] == slow, "it was well meanwhile"


def test_one_rank_is_no_straggler() -> None:
    figures, slow = Stragglers(["a"], slow_factor=1.5).compare([2.0], [0])
    assert (figures["own_time"], figures["slowest_rank"], slow) == (2.0, 0, None)
