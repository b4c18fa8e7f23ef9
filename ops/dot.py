"""The matrix product of Triton kernels, the same compiled and interpreted."""

import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bf16 operands as integers; there they are rounded and widened.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, DTYPE: tl.constexpr):
    """a @ b of operands rounded to DTYPE (bf16, fp16, fp32 or fp64), summed in fp32 (fp64); fp32 is not cut to TF32."""
    a = a.to(DTYPE)
    b = b.to(DTYPE)
    if INTERPRETED and tl.bfloat16 == DTYPE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
