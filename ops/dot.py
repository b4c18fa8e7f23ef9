"""The matrix product of Triton kernels, the same compiled and interpreted."""

import triton
import triton.language as tl

from ops.rounding import INTERPRETED, rounded


@triton.jit
def dot(a, b, DTYPE: tl.constexpr):
    """a @ b of operands rounded to DTYPE (bf16, fp16, fp32 or fp64), summed in fp32 (fp64); fp32 is not cut to TF32."""
    if a.dtype != DTYPE:
        a = rounded(a, DTYPE)
    if b.dtype != DTYPE:
        b = rounded(b, DTYPE)
    if INTERPRETED and tl.bfloat16 == DTYPE:  # whose products the interpreter would form of bit patterns
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
