"""The dtypes of Triton kernels, and the rounding of what they store, the same compiled and interpreted."""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, to nearest even; of itself the interpreter would cut fp32 to bf16, and make 1e-38 of 0."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        # Rounding would carry the payload of some NaNs into the sign.
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)
