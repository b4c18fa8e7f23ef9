"""What more than one room's tests share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read where kernels are defined, so before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

from tests.parallel.launch import Ranks

LONGEST = (
    "slurm/test_scripts.py",
    "test_train.py",
    "faults/test_faults.py",
    "test_health.py",
    "models/test_delta_oracles.py",
)
"""Files that take a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They begin, so that of two processes none has one left to itself when the other is done."""
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n processes in one gloo group (tests/parallel/launch.py), shared by tests until they are tired."""
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        for group in started.values():
            if group.alive and group.tired:
                group.close()
        if size not in started or not started[size].alive:
            started[size] = Ranks(size)
        return started[size]

    yield get
    for group in started.values():
        group.close()
