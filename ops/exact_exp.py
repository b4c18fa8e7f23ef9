"""The exponential of Triton kernels where the hardware's own is not exact enough."""

import triton
import triton.language as tl


@triton.jit
def exact_exp(x):
    """exp(x) of fp32 x <= 0 to within rounding. The hardware's own errs several times as much, which counts where
    products are fp32: errors of decays add up along a sequence. x = n log 2 + r with |r| <= log(2) / 2."""
    m_zero = x < -104.0  # where fp32 has no number this small
    b_x = tl.where(m_zero, 0.0, x)
    n = tl.floor(b_x * 1.4426950408889634 + 0.5)
    r = b_x - n * 0.693359375 + n * 2.12194440e-4  # log 2 in two parts, the first times n exact
    tail = 1 / 120 + r * (1 / 720 + r * (1 / 5040))
    power = 1.0 + (r + r * r * (0.5 + r * (1 / 6 + r * (1 / 24 + r * tail))))
    return tl.where(m_zero, 0.0, power * tl.exp2(n))
