"""The diagonal LSTM of ParaRNN: nonlinear in its state, each channel on its own."""

from typing import Any

from torch import Tensor

from ops.check import check_dim, check_floating, check_layout, check_shape
from ops.diagonal_lstm import chunked, reference
from ops.diagonal_lstm.shooting import Statistics
from ops.impl import resolve_impl
from ops.layout import Layout

__all__ = ["Statistics", "diagonal_lstm"]


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

    The chunked form cuts T into segments that it solves side by side (`ops/diagonal_lstm/shooting.py`):

    segments:         S; by default chosen from B, T, D and device; 1 is the plain sequential loop
    tolerance:        largest mismatch of states where segments meet; by default 1e-6, 1e-13 in float64. With S > 1 one
                      number a sweep is read back from the device, to compare it
    max_corrections:  of the segments' start states, before what has not converged is solved sequentially; by default 3.
                      S - 1 give the sequential loop to the bit
    statistics:       is filled with how the call was solved

    Returns h [B, T, D] in gates' dtype, and the last (cell, hidden) [B, 2, D] in fp32 if `output_final_state`, else
    None. The recurrence runs in fp32 (float64 for float64 inputs) in every implementation.
    Raises ValueError for wrong shapes, dtypes or options and for an implementation that cannot run here.
    """
    _check_tensors(gates, a, c, initial_state, layout)
    options: dict[str, Any] = {"segments": segments, "tolerance": tolerance, "max_corrections": max_corrections}
    chosen = resolve_impl("diagonal_lstm", impl, gates.device.type)
    _check_options(options, chosen)
    if chosen == "reference":
        vars(statistics or Statistics()).update(vars(Statistics()))
        y, state = reference.diagonal_lstm(gates, a, c, layout, initial_state)
    else:
        y, state = chunked.diagonal_lstm(gates, a, c, layout, initial_state, statistics=statistics, **options)
    return y, state if output_final_state else None


def _check_tensors(gates: Tensor, a: Tensor, c: Tensor, initial_state: Tensor | None, layout: Layout | None) -> None:
    check_dim("diagonal_lstm", "gates", gates, "B T 3 D")
    batch, time, _, width = gates.shape
    check_shape("diagonal_lstm", "gates", gates, "B T 3 D", batch, time, 3, width)
    check_shape("diagonal_lstm", "a", a, "3 D", 3, width)
    check_shape("diagonal_lstm", "c", c, "2 D", 2, width)
    check_shape("diagonal_lstm", "initial_state", initial_state, "B 2 D", batch, 2, width)
    check_floating("diagonal_lstm", gates=gates, a=a, c=c, initial_state=initial_state)
    check_layout("diagonal_lstm", layout, batch, time)


def _check_options(options: dict[str, Any], impl: str) -> None:
    for (name, value), least in zip(options.items(), (1, 0, 0)):
        if value is None:
            continue
        if impl == "reference":
            raise ValueError(f"diagonal_lstm: {name} is {value}; impl 'reference' has no segments: leave {name} out")
        if value < least:
            raise ValueError(f"diagonal_lstm: {name} is {value}; must be >= {least}")
