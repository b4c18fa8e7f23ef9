"""diagonal_lstm by multiple shooting, with a hand-written linear backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.diagonal_lstm.adjoint import backward
from ops.diagonal_lstm.shooting import Shooting, Statistics, solve
from ops.diagonal_lstm.trajectory import Cell, Restarts, Trajectory
from ops.layout import Layout
from ops.precision import accumulation_dtype

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Largest residual between segments; states are of order one."""
MAX_CORRECTIONS = 3
"""Weights that train need one to three; chaotic channels need many, and the sequential loop is cheaper for them."""
FULL_CPU, FULL_ACCELERATOR = 2**10, 2**18
"""Channels B * D from which a step fills the device and segments beside each other gain nothing. Measured on a CPU; on
an accelerator about the threads it holds."""
MIN_SEGMENTS, MIN_LENGTH = 8, 64
"""Fewer segments do not pay for the extra sweeps, shorter ones not for the products and the pass over segments."""


def diagonal_lstm(
    gates: Tensor,
    a: Tensor,
    c: Tensor,
    layout: Layout | None,
    initial_state: Tensor | None,
    *,
    segments: int | None = None,
    tolerance: float | None = None,
    max_corrections: int | None = None,
    statistics: Statistics | None = None,
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the last state [B, 2, D]; arguments as in `ops.diagonal_lstm`."""
    dtype = accumulation_dtype(gates, a, c)
    batch, time, _, width = gates.shape
    if initial_state is None:
        initial_state = gates.new_zeros(batch, 2, width, dtype=dtype)
    how = Shooting(
        segments=min(segments or default_segments(batch, time, width, gates.device.type), time),
        tolerance=TOLERANCE[dtype] if tolerance is None else tolerance,
        max_corrections=MAX_CORRECTIONS if max_corrections is None else max_corrections,
    )
    restarts = None if layout is None else layout.derive(_restarts, dtype)
    tensors = (gates, a, c, initial_state)
    y, state = DiagonalLSTM.apply(*(z.to(dtype) for z in tensors), restarts, how, statistics or Statistics())
    return y.to(gates.dtype), state


def default_segments(batch: int, time: int, width: int, device_type: str) -> int:
    """S: a power of two such that the segments together fill the device a few times and none is short, else 1."""
    full = FULL_CPU if device_type == "cpu" else FULL_ACCELERATOR
    most = min(8 * full // (batch * width), time // MIN_LENGTH)
    if batch * width >= full or most < MIN_SEGMENTS:
        return 1
    return 1 << (most.bit_length() - 1)


def _restarts(positions: Tensor, dtype: torch.dtype) -> Restarts | None:
    restarts = Restarts.of((positions == 0)[:, :, None], dtype)
    return restarts if any(restarts.steps) else None


class DiagonalLSTM(torch.autograd.Function):
    """(gates [B, T, 3, D], a [3, D], c [2, D], initial_state [B, 2, D], restarts, how, statistics) ->
    (h [B, T, D], last state [B, 2, D])."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        a: Tensor,
        c: Tensor,
        initial_state: Tensor,
        restarts: Restarts | None,
        how: Shooting,
        statistics: Statistics,
    ) -> tuple[Tensor, Tensor]:
        trajectory = solve(gates, Cell(a, c), initial_state, restarts, how, statistics)
        ctx.save_for_backward(a, c, trajectory.acts, trajectory.cells, trajectory.hiddens)
        ctx.restarts = restarts
        return trajectory.hiddens[:, 1:], trajectory.state(gates.shape[1] - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        a, c, *trajectory = ctx.saved_tensors
        gradients = backward(dy, dstate, Cell(a, c), ctx.restarts, Trajectory(*trajectory))
        return gradients.gates, gradients.a, gradients.c, gradients.initial_state, None, None, None
