"""What a slice of a diagonal GRU's sequence does to the state before it."""

from torch import Tensor

from ops.affine import Affine
from ops.diagonal_gru.chunked import form
from ops.diagonal_gru.inputs import check_inputs
from ops.layout import Layout


def diagonal_gru_summary(
    gates: Tensor, a: Tensor, *, layout: Layout | None = None, initial_state: Tensor | None = None
) -> Affine:
    """The slice linearised around a guess [B, 1, D] of the state before it: `ops.diagonal_lstm_summary` for the GRU.

    Arguments as in `ops.diagonal_gru`. Returns transition [B, 1, 1, D] and offset [B, 1, D].
    """
    check_inputs("diagonal_gru_summary", gates, a, layout, initial_state)
    return form.summary(gates, a, layout, initial_state)
