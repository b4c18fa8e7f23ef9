"""The diagonal LSTM of ParaRNN: nonlinear in its state, each channel on its own."""

from typing import Any

from torch import Tensor

from ops.diagonal_cell.options import check_options
from ops.diagonal_cell.statistics import Statistics
from ops.diagonal_lstm import chunked, reference
from ops.diagonal_lstm.inputs import check_inputs
from ops.diagonal_lstm.summary import diagonal_lstm_summary
from ops.impl import resolve_impl
from ops.layout import Layout

__all__ = ["Statistics", "diagonal_lstm", "diagonal_lstm_summary"]


def diagonal_lstm(
    gates: Tensor,
    a: Tensor,
    c: Tensor,
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
    """The LSTM with coupled input and forget gate, diagonal recurrent weights and peepholes (ParaRNN, arXiv
    2510.21450, equation 3.1):

        f = sigmoid(a_f h_{t-1} + gates_f + c_f cell_{t-1}),  z = tanh(a_z h_{t-1} + gates_z)
        cell_t = f cell_{t-1} + (1 - f) z
        o = sigmoid(a_o h_{t-1} + gates_o + c_o cell_t),      h_t = o tanh(cell_t)

    gates:          [B, T, 3, D], what the input adds to the pre-activations, in the order forget, output, candidate
    a:              [3, D], recurrent weights in the same order
    c:              [2, D], peepholes of forget and output gate
    layout:         a document's first token sees a state of zeros, whatever `initial_state` says
    initial_state:  [B, 2, D], (cell, hidden) before the first token; zeros by default

    The chunked and the Triton form cut T into segments that they solve side by side (`ops/diagonal_cell/shooting.py`):

    segments:         S; by default chosen from B, T, D and device; 1 is the plain sequential loop. The Triton form
                      may take fewer, as its segments are multiples of 16 tokens
    tolerance:        largest error of the state where a segment starts, estimated from the mismatch of states where
                      segments meet; by default 1e-6, 1e-13 in float64. With S > 1 the chunked form reads one number a
                      sweep back from the device, to compare it
    max_corrections:  of the segments' start states, before what has not converged is solved sequentially; by default 3.
                      S - 1 give the sequential loop to the bit
    statistics:       is filled with how the call was solved

    Returns h [B, T, D] in gates' dtype, and the last (cell, hidden) [B, 2, D] in fp32 if `output_final_state`, else
    None. The recurrence runs in fp32 (float64 for float64 inputs) in every implementation.
    Raises ValueError for wrong shapes, dtypes or options and for an implementation that cannot run here.
    """
    check_inputs("diagonal_lstm", gates, a, c, layout, initial_state)
    options: dict[str, Any] = {"segments": segments, "tolerance": tolerance, "max_corrections": max_corrections}
    chosen = resolve_impl("diagonal_lstm", impl, gates.device.type)
    check_options("diagonal_lstm", chosen, **options)
    if chosen == "reference":
        if statistics is not None:
            statistics.report = None
        y, state = reference.diagonal_lstm(gates, a, c, layout, initial_state)
    elif chosen == "triton":
        from ops.diagonal_lstm import triton

        y, state = triton.diagonal_lstm(gates, a, c, layout, initial_state, statistics=statistics, **options)
    else:
        y, state = chunked.diagonal_lstm(gates, a, c, layout, initial_state, statistics=statistics, **options)
    return y, state if output_final_state else None
