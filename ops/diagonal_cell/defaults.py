"""How a sequence is solved where the caller does not say."""

import torch
from torch import Tensor

from ops.diagonal_cell.shooting import Shooting

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Largest error of a segment's start; states are of order one."""
MAX_CORRECTIONS = 3
"""Weights that train need one to three; chaotic channels need many, and the sequential loop is cheaper for them."""
FULL_CPU, FULL_ACCELERATOR = 2**10, 2**18
"""Channels B * D from which a step fills the device and segments beside each other gain nothing. Measured on a CPU; on
an accelerator about the threads it holds."""
MIN_SEGMENTS, MIN_LENGTH = 8, 64
"""Fewer segments do not pay for the extra sweeps, shorter ones not for the products and the pass over segments."""


def shooting_of(
    gates: Tensor, segments: int | None = None, tolerance: float | None = None, max_corrections: int | None = None
) -> Shooting:
    """For gates [B, T, G, D] in the dtype of the recurrence; None stands for the default."""
    batch, time, _, width = gates.shape
    if segments is None:
        segments = default_segments(batch, time, width, gates.device.type)
    return Shooting(
        min(segments, time),
        TOLERANCE[gates.dtype] if tolerance is None else tolerance,
        MAX_CORRECTIONS if max_corrections is None else max_corrections,
    )


def default_segments(batch: int, time: int, width: int, device_type: str) -> int:
    """S: a power of two such that the segments together fill the device a few times and none is short, else 1."""
    full = FULL_CPU if device_type == "cpu" else FULL_ACCELERATOR
    most = min(8 * full // (batch * width), time // MIN_LENGTH)
    if batch * width >= full or most < MIN_SEGMENTS:
        return 1
    return 1 << (most.bit_length() - 1)
