"""What the Triton kernels of gated_linear_attention do with tiles [C, BK] of a chunk, C tokens by BK channels.

Offsets are formed anew where a tile is loaded or stored: rows of them, kept for several tiles as those of
gated_delta_rule are, take registers that these kernels do not have.

Everywhere ACC is the dtype of elementwise work and of sums, DTYPE that of the operands of products.
"""

import triton
import triton.language as tl

from ops.dot import dot
from ops.exact_exp import exact_exp
from ops.rounding import rounded


@triton.jit
def load_tile(p, i_b, i_h, o_t, m_t, o_f, T, H, F: tl.constexpr, ACC: tl.constexpr):
    """Rows o_t (int64) and features o_f of p [B, T, H, F], zeros where m_t is false and beyond F."""
    offsets = ((i_b * T + o_t[:, None]) * H + i_h) * F + o_f[None, :]
    return tl.load(p + offsets, mask=m_t[:, None] & (o_f < F)[None, :], other=0.0).to(ACC)


@triton.jit
def store_tile(p, x, i_b, i_h, o_t, m_t, o_f, T, H, F: tl.constexpr):
    offsets = ((i_b * T + o_t[:, None]) * H + i_h) * F + o_f[None, :]
    tl.store(p + offsets, rounded(x, p.dtype.element_ty), mask=m_t[:, None] & (o_f < F)[None, :])


@triton.jit
def load_decays(
    p_log_decay,
    p_starts,
    i_b,
    i_h,
    o_t,
    m_t,
    o_k,
    T,
    H,
    K: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """exp of rows o_t of log_decay: 0 at a document's first token, 1 where m_t is false and beyond K."""
    decay = load_tile(p_log_decay, i_b, i_h, o_t, m_t, o_k, T, H, K, ACC)
    decay = exact_exp(decay) if tl.float32 == DTYPE and tl.float32 == ACC else tl.exp(decay)
    if HAS_STARTS:
        start = tl.load(p_starts + i_b * T + o_t, mask=m_t, other=0) != 0
        decay = tl.where(start[:, None], 0.0, decay)
    return decay


@triton.jit
def beside(x, i_level, C: tl.constexpr, BK: tl.constexpr):
    """x [C, BK] with row r ^ 2**i_level in place of row r."""
    o_beside = tl.arange(0, C) ^ (1 << i_level)
    return tl.gather(x, tl.broadcast_to(o_beside[:, None], (C, BK)), 0)


@triton.jit
def masked_sums(m, x, ACC: tl.constexpr, DTYPE: tl.constexpr):
    """For each row of the mask m [C, C] the sum of those rows of x [C, BK]; where products have bf16 operands, of the
    16 bits that two of them hold of each number."""
    b_m = tl.where(m, 1.0, 0.0).to(ACC)
    if tl.bfloat16 == DTYPE:
        b_high = rounded(x, DTYPE).to(tl.float32)
        return dot(b_m, b_high, DTYPE) + dot(b_m, x - b_high, DTYPE)
    return dot(b_m, x, ACC)
