"""The room's tests run with NaN in the memory that torch.empty returns, so that no op reads what it did not write."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan(), "torch.utils.deterministic.fill_uninitialized_memory is off"
    yield
    torch.use_deterministic_algorithms(before)
