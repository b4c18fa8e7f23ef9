"""diagonal_lstm on a GPU: the device functions of its cell (`ops.diagonal_cell.triton` tells what each does)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.diagonal_cell.nonlinearities import sigmoid, tanh
from ops.diagonal_cell.triton import Cell, TritonForm
from ops.layout import Layout


@triton.jit
def advance(state, gates, weights):
    cell, h = state
    a_f, a_o, a_z, c_f, c_o = weights
    # What is known last comes last: h after the cell here, the cell after h below.
    f = sigmoid(tl.fma(a_f, h, tl.fma(c_f, cell, gates[0])))
    z = tanh(tl.fma(a_z, h, gates[2]))
    cell = tl.fma(f, cell - z, z)
    o = sigmoid(tl.fma(c_o, cell, tl.fma(a_o, h, gates[1])))
    tanh_cell = tanh(cell)
    return (cell, o * tanh_cell), (f, o, z, tanh_cell)


@triton.jit
def slopes(state, acts, weights):
    """(f, cell by f's pre-activation, cell by z's, h by o's, h by the cell through tanh and the peephole)."""
    f, o, z, tanh_cell = acts
    by_forget = (state[0] - z) * (f * (1.0 - f))
    by_candidate = (1.0 - f) * tl.fma(-z, z, 1.0)
    by_output = tanh_cell * (o * (1.0 - o))
    by_cell = tl.fma(by_output, weights[4], o * tl.fma(-tanh_cell, tanh_cell, 1.0))
    return f, by_forget, by_candidate, by_output, by_cell


@triton.jit
def push(tangent, slopes, weights):
    cell, h = tangent
    a_f, a_o, a_z, c_f, _c_o = weights
    f, by_forget, by_candidate, by_output, by_cell = slopes
    next_cell = tl.fma(by_forget, tl.fma(a_f, h, c_f * cell), tl.fma(by_candidate, a_z * h, f * cell))
    return next_cell, tl.fma(by_cell, next_cell, by_output * (a_o * h))


@triton.jit
def pull(gradient, slopes, weights):
    dcell, dh = gradient
    a_f, a_o, a_z, c_f, _c_o = weights
    f, by_forget, by_candidate, by_output, by_cell = slopes
    dcell = tl.fma(by_cell, dh, dcell)
    d_f, d_o, d_z = dcell * by_forget, dh * by_output, dcell * by_candidate
    earlier = tl.fma(c_f, d_f, f * dcell), tl.fma(a_f, d_f, tl.fma(a_z, d_z, a_o * d_o))
    return earlier, (d_f, d_o, d_z)


@triton.jit
def weigh(dgates, state, next_state, acts):
    cell, h = state
    d_f, d_o, d_z = dgates
    return d_f * h, d_o * h, d_z * h, d_f * cell, d_o * next_state[0]


CELL = Cell(advance, slopes, push, pull, weigh, num_states=2, num_weights=5)
form = TritonForm("diagonal_lstm", CELL)


def diagonal_lstm(
    gates: Tensor, a: Tensor, c: Tensor, layout: Layout | None, initial_state: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the last state [B, 2, D]; arguments and options as in `ops.diagonal_lstm`."""
    return form(gates, torch.cat([a, c]), layout, initial_state, **options)
