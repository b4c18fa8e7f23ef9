"""The diagonal GRU of ParaRNN: nonlinear in its state, each channel on its own."""

from typing import Any

from torch import Tensor

from ops.diagonal_cell.options import check_options
from ops.diagonal_cell.statistics import Statistics
from ops.diagonal_gru import chunked, reference
from ops.diagonal_gru.inputs import check_inputs
from ops.diagonal_gru.summary import diagonal_gru_summary
from ops.impl import resolve_impl
from ops.layout import Layout

__all__ = ["Statistics", "diagonal_gru", "diagonal_gru_summary"]


def diagonal_gru(
    gates: Tensor,
    a: Tensor,
    *,
    layout: Layout | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
    segments: int | None = None,
    tolerance: float | None = None,
    max_corrections: int | None = None,
    statistics: Statistics | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The GRU with diagonal recurrent weights (ParaRNN, arXiv 2510.21450, equation 3.1):

        z = sigmoid(a_z h_{t-1} + gates_z),  r = sigmoid(a_r h_{t-1} + gates_r)
        c = tanh(a_c (h_{t-1} r) + gates_c),  h_t = (1 - z) h_{t-1} + z c

    gates:          [B, T, 3, D], what the input adds to the pre-activations, in the order update, reset, candidate
    a:              [3, D], recurrent weights in the same order
    layout:         a document's first token sees a state of zeros, whatever `initial_state` says
    initial_state:  [B, 1, D], h before the first token; zeros by default
    segments, tolerance, max_corrections, statistics: as in `ops.diagonal_lstm`

    Returns h [B, T, D] in gates' dtype, and the last h [B, 1, D] in fp32 if `output_final_state`, else None. The
    recurrence runs in fp32 (float64 for float64 inputs) in every implementation.
    Raises ValueError for wrong shapes, dtypes or options and for an implementation that cannot run here.
    """
    check_inputs("diagonal_gru", gates, a, layout, initial_state)
    options: dict[str, Any] = {"segments": segments, "tolerance": tolerance, "max_corrections": max_corrections}
    chosen = resolve_impl("diagonal_gru", impl, gates.device.type)
    check_options("diagonal_gru", chosen, **options)
    if chosen == "reference":
        if statistics is not None:
            statistics.report = None
        y, state = reference.diagonal_gru(gates, a, layout, initial_state)
    elif chosen == "triton":
        from ops.diagonal_gru import triton

        y, state = triton.diagonal_gru(gates, a, layout, initial_state, statistics=statistics, **options)
    else:
        y, state = chunked.diagonal_gru(gates, a, layout, initial_state, statistics=statistics, **options)
    return y, state if output_final_state else None
