"""Documents as sequences of the rows laid end to end: how variable-length kernels of other projects know them."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad


class Sequences(NamedTuple):
    """Documents, also those that continue from the row before, as sequences of the rows laid end to end."""

    borders: Tensor  # int64 [N + 1]
    first: Tensor  # int64 [B], of each row's sequences
    last: Tensor  # int64 [B]


def sequences_of(positions: Tensor) -> Sequences:
    """Waits for the device, once a layout."""
    starts = positions == 0
    starts[:, 0] = True
    begins = starts.flatten().nonzero().flatten()
    last = starts.sum(1).cumsum(0) - 1
    return Sequences(pad(begins, (0, 1), value=positions.numel()), last - starts.sum(1) + 1, last)
