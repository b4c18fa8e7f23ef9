"""Layout: what it accepts, and that it derives each thing once."""

import pytest
import torch
from torch import Tensor

from ops import Layout


def test_documents_may_be_packed_and_continued() -> None:
    layout = Layout(torch.tensor([[5, 6, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]))
    assert layout.starts.tolist() == [[False, False, True, False, True, True], [True] + [False] * 5]


def test_derives_once() -> None:
    calls = []

    def derived(positions: Tensor, number: int) -> int:
        calls.append(number)
        return number + int(positions.sum())

    layout = Layout(torch.tensor([[0, 1, 2]]))
    assert [layout.derive(derived, number) for number in (1, 2, 1, 2)] == [4, 5, 4, 5]
    assert calls == [1, 2]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([0, 1]), r"\[2\]; must be int64 \[B, T\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"\[1, 0\]"),
        (torch.zeros(1, 2, dtype=torch.int32), "torch.int32"),
        (torch.tensor([[0, 1], [-1, 0]]), "-1 is negative"),
        (torch.tensor([[0, 1, 2], [0, 1, 3]]), "1 is followed by 3 in row 1 at t = 2"),
        (torch.tensor([[0, 1, 1]]), "1 is followed by 1 in row 0 at t = 2"),
    ],
)
def test_refuses(positions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(positions)
