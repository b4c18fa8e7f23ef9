"""The nonlinearities of Triton kernels, of full relative accuracy and without overflow."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -_LOG2_E))  # the power may overflow: 1 / inf is 0


# tanh(x) = x + x^3 P(x^2) for |x| < 0.6: a minimax fit, of relative error 3e-9.
_TANH_BOUND = tl.constexpr(0.6)
_TANH_0, _TANH_1, _TANH_2 = tl.constexpr(-0.33333298), tl.constexpr(0.13331924), tl.constexpr(-0.05378383)
_TANH_3, _TANH_4 = tl.constexpr(0.020795971), tl.constexpr(-0.0058951577)


@triton.jit
def tanh(x):
    value = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * _LOG2_E)))  # loses to the 1 what is small
    if x.dtype == tl.float32:
        square = x * x
        series = tl.fma(square, tl.fma(square, _TANH_4, _TANH_3), _TANH_2)
        series = tl.fma(square, tl.fma(square, series, _TANH_1), _TANH_0)
        value = tl.where(tl.abs(x) < _TANH_BOUND, tl.fma(x * square, series, x), value)
    return value
