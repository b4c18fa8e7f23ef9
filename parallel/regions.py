"""The stream at the borders of what is cut over tensor ranks: whole on every rank, or cut along T.

Whole, it enters a region as it is, and the sum over ranks leaves it: an all-reduce forward at one border, backward at
the other. Cut along T (Korthikanti et al., 2022, arXiv 2205.05198), it is gathered where it enters, and each rank keeps
its tokens of the sum: norms and residuals between regions are computed once, and held once, instead of on every rank.
"""

from dataclasses import dataclass

from torch import Tensor

from parallel.axes import Axis
from parallel.collectives import copy_to, gather_slices, reduce_from, reduce_slices


@dataclass
class Region:
    """
    Attributes:
        axis: the tensor axis.
        sliced: whether the stream is cut along T.
    """

    axis: Axis
    sliced: bool = False


def enter(x: Tensor, region: Region) -> Tensor:
    """The stream `[B, T, D]` for work that differs between ranks: `[B, T / ranks, D]` where it is sliced."""
    return gather_slices(x, region.axis) if region.sliced else copy_to(x, region.axis)


def leave(y: Tensor, region: Region) -> Tensor:
    """The sum of all ranks' `[B, T, D]`, or this rank's tokens of it."""
    return reduce_slices(y, region.axis) if region.sliced else reduce_from(y, region.axis)
