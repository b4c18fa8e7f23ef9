"""diagonal_gru on a GPU: the device functions of its cell (`ops.diagonal_cell.triton` tells what each does)."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ops.diagonal_cell.nonlinearities import sigmoid, tanh
from ops.diagonal_cell.triton import Cell, TritonForm
from ops.layout import Layout


@triton.jit
def advance(state, gates, weights):
    (h,) = state
    a_z, a_r, a_c = weights
    z = sigmoid(tl.fma(a_z, h, gates[0]))
    r = sigmoid(tl.fma(a_r, h, gates[1]))
    c = tanh(tl.fma(a_c, h * r, gates[2]))
    return (tl.fma(z, c - h, h),), (z, r, c)


@triton.jit
def slopes(state, acts, weights):
    """(1 - z, r, h_t by z's pre-activation, h r by r's, h_t by c's)."""
    (h,) = state
    z, r, c = acts
    return 1.0 - z, r, (c - h) * (z * (1.0 - z)), h * (r * (1.0 - r)), z * tl.fma(-c, c, 1.0)


@triton.jit
def push(tangent, slopes, weights):
    (h,) = tangent
    a_z, a_r, a_c = weights
    keep, r, by_update, by_reset, by_candidate = slopes
    reset = tl.fma(by_reset, a_r * h, r * h)
    return (tl.fma(by_candidate, a_c * reset, tl.fma(by_update, a_z * h, keep * h)),)


@triton.jit
def pull(gradient, slopes, weights):
    (dh,) = gradient
    a_z, a_r, a_c = weights
    keep, r, by_update, by_reset, by_candidate = slopes
    d_z, d_c = dh * by_update, dh * by_candidate
    d_reset = d_c * a_c
    d_r = d_reset * by_reset
    earlier = tl.fma(a_r, d_r, tl.fma(r, d_reset, tl.fma(a_z, d_z, keep * dh)))
    return (earlier,), (d_z, d_r, d_c)


@triton.jit
def weigh(dgates, state, next_state, acts):
    (h,) = state
    d_z, d_r, d_c = dgates
    return d_z * h, d_r * h, d_c * (h * acts[1])


CELL = Cell(advance, slopes, push, pull, weigh, num_states=1, num_weights=3)
form = TritonForm("diagonal_gru", CELL)


def diagonal_gru(
    gates: Tensor, a: Tensor, layout: Layout | None, initial_state: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the last state [B, 1, D]; arguments and options as in `ops.diagonal_gru`."""
    return form(gates, a, layout, initial_state, **options)
