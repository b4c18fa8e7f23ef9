"""What a slice of a diagonal LSTM's sequence does to the state before it."""

import torch
from torch import Tensor

from ops.affine import Affine
from ops.diagonal_lstm.chunked import form
from ops.diagonal_lstm.inputs import check_inputs
from ops.layout import Layout


def diagonal_lstm_summary(
    gates: Tensor, a: Tensor, c: Tensor, *, layout: Layout | None = None, initial_state: Tensor | None = None
) -> Affine:
    """The slice linearised around a guess of the state before it: multiple shooting with slices as segments.

    Arguments as in `ops.diagonal_lstm`; `initial_state` [B, 2, D] is the guess, zeros by default. Returns transition
    [B, 2, 2, D], the product of the slice's Jacobians, 0 where a document starts in it, and offset [B, 2, D], such that
    at the guess the map gives the state after the slice exactly. Where the product overflows the transition is 0.

    Start states are found by repetition: linearise every slice around its guess, compose the maps (`Affine.then`) from
    the true first state on, take what each slice is given as its next guess. After k repetitions the first k + 1 slices
    have theirs; few are needed, and they have converged when guesses stop moving.

    Differentiable in gates, a and c. The guess and the transition count as constants: once the guesses have converged,
    this gives start states composed from the maps, and outputs computed from them, the gradients of the whole sequence.
    The forward pass keeps no token's state; the backward pass runs the slice again.
    Raises ValueError for wrong shapes or dtypes.
    """
    check_inputs("diagonal_lstm_summary", gates, a, c, layout, initial_state)
    return form.summary(gates, torch.cat([a, c]), layout, initial_state)
