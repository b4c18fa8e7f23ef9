"""The parallel form of a diagonal cell: multiple shooting with a linear backward pass."""

from torch import Tensor

from ops.affine import Affine
from ops.diagonal_cell.cell import DiagonalCell
from ops.diagonal_cell.registered import RegisteredOps
from ops.diagonal_cell.statistics import Statistics
from ops.layout import Layout
from ops.precision import accumulation_dtype


class ChunkedForm:
    """Runs a cell; of one name only one can be registered."""

    def __init__(self, cell: DiagonalCell) -> None:
        self.cell = cell
        self.ops = RegisteredOps(cell)

    def __call__(
        self,
        gates: Tensor,
        weights: Tensor,
        layout: Layout | None,
        initial_state: Tensor | None,
        *,
        segments: int | None = None,
        tolerance: float | None = None,
        max_corrections: int | None = None,
        statistics: Statistics | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output [B, T, D] in gates' dtype and the last state [B, n, D].

        gates [B, T, G, D], weights [W, D], initial_state [B, n, D]; options as in `ops.diagonal_lstm`.
        """
        inputs = self._inputs(gates, weights, layout, initial_state)
        y, state, report, *_ = self.ops.forward(*inputs, segments, tolerance, max_corrections)
        if statistics is not None:
            statistics.report = report
        return y.to(gates.dtype), state

    def summary(self, gates: Tensor, weights: Tensor, layout: Layout | None, initial_state: Tensor | None) -> Affine:
        """The slice linearised around `initial_state`, as `ops.diagonal_lstm_summary` tells."""
        gates, weights, start, starts = self._inputs(gates, weights, layout, initial_state)
        start = start.detach()
        end, transition = self.ops.summary(gates, weights, start, starts)
        return Affine(transition, end - (transition * start.unsqueeze(1)).sum(2))

    def _inputs(
        self, gates: Tensor, weights: Tensor, layout: Layout | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dtype = accumulation_dtype(gates, weights)
        if initial_state is None:
            initial_state = gates.new_zeros(gates.shape[0], self.cell.num_states, gates.shape[3], dtype=dtype)
        starts = None if layout is None else layout.starts
        return gates.to(dtype), weights.to(dtype), initial_state.to(dtype), starts
