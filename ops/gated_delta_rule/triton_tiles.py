"""What the kernels of gated_delta_rule share: tiles of rows, the decays inside a chunk, and the chunk's inverse.

A program owns BT tokens (a chunk) of one head of one row. Tokens beyond T are read as zeros, so that their log decay is
0, their key 0 and their beta 0: they neither decay nor write, and they continue the last document.
"""

import triton
import triton.language as tl

from ops.dot import dot
from ops.rounding import rounded


@triton.jit
def load_tile(p, o_row, m_row, o_col, m_col):
    """[rows, columns] of a row-major matrix, 0 where masked; `o_row` holds the offset of each row's first number."""
    return tl.load(p + o_row[:, None] + o_col[None, :], mask=m_row[:, None] & m_col[None, :], other=0.0)


@triton.jit
def store_tile(p, o_row, m_row, o_col, m_col, b):
    tl.store(p + o_row[:, None] + o_col[None, :], rounded(b, p.dtype.element_ty), mask=m_row[:, None] & m_col[None, :])


@triton.jit
def load_positions(p_positions, i_b, i_n, T, BT: tl.constexpr):
    """Of the chunk's tokens [BT]; tokens beyond T go on with the last document."""
    o_t = i_n * BT + tl.arange(0, BT)
    o_last = tl.minimum(o_t, T - 1)
    return (tl.load(p_positions + i_b.to(tl.int64) * T + o_last) + (o_t - o_last)).to(tl.int32)


@triton.jit
def pair_decays(b_log_decay, b_positions, BT: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """[BT, BT]: the decay from after token s to after token t >= s, 0 above the diagonal and across a document start.

    Every exponent is summed over its own interval. The mask comes before the exponential, so that nothing that does not
    count can overflow in it.
    """
    o_r = tl.arange(0, BT)
    b_sums = tl.cumsum(tl.where(o_r[:, None] > o_r[None, :], b_log_decay[:, None], 0.0), axis=0)
    m_pair = o_r[:, None] >= o_r[None, :]
    if HAS_POSITIONS:
        m_pair = m_pair & (o_r[:, None] - o_r[None, :] <= b_positions[:, None])
    return tl.where(m_pair, tl.exp(tl.where(m_pair, b_sums, 0.0)), 0.0)


@triton.jit
def carry_decays(b_log_decay, b_positions, BT: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """[BT] each: the decay from before the chunk to after t, and from after s to the chunk's end; 0 across a document
    start. The first one's last entry is the decay of the whole chunk."""
    o_r = tl.arange(0, BT)
    b_in = tl.exp(tl.cumsum(b_log_decay, axis=0))
    b_out = tl.exp(tl.sum(tl.where(o_r[None, :] > o_r[:, None], b_log_decay[None, :], 0.0), axis=1))
    if HAS_POSITIONS:
        i_last = tl.max(tl.where(o_r == BT - 1, b_positions, 0), axis=0)
        b_in = tl.where(b_positions > o_r, b_in, 0.0)
        b_out = tl.where(BT - 1 - o_r <= i_last, b_out, 0.0)
    return b_in, b_out


@triton.jit
def unit_lower_inverse(b_lower, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L [BT, BT], BT a multiple of 16.

    Forward substitution in all diagonal blocks of 16 at once. Then, with X the inverse of the diagonal blocks and L'
    what L holds beside them in blocks of twice the size, X - X L' X is the inverse of those: for each entry the sums of
    a substitution by blocks, and zeros. Powers of L, which can be huge and cancel, are never formed.
    """
    NB: tl.constexpr = BT // 16
    o_b = tl.arange(0, NB)
    o_r = tl.arange(0, 16)
    m_same = o_b[:, None, None, None] == o_b[None, None, :, None]
    b_blocks = tl.sum(tl.where(m_same, tl.reshape(b_lower, (NB, 16, NB, 16)), 0.0), axis=2)  # [NB, 16, 16]
    b_x = tl.where((o_r[:, None] == o_r[None, :])[None, :, :], 1.0, b_blocks * 0.0)
    for i_r in range(1, 16):
        m_row = o_r[None, :, None] == i_r
        b_row = tl.sum(tl.where(m_row, b_blocks, 0.0), axis=1)  # [NB, 16]: row i_r of L
        b_row = tl.sum(b_row[:, :, None] * b_x, axis=1)
        b_x = tl.where(m_row, b_x - b_row[:, None, :], b_x)
    b_inverse = tl.reshape(tl.where(m_same, b_x[:, :, None, :], 0.0), (BT, BT))
    if BT > 16:
        b_inverse = _double(b_inverse, b_lower, 16, BT, PRECISION)
    if BT > 32:
        b_inverse = _double(b_inverse, b_lower, 32, BT, PRECISION)
    return b_inverse


@triton.jit
def _double(b_inverse, b_lower, SIZE: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverse of I + L in blocks of SIZE to that in blocks of twice the size."""
    o_block = tl.arange(0, BT) // SIZE
    m_below = (o_block[:, None] % 2 == 1) & (o_block[:, None] - 1 == o_block[None, :])
    b_below = tl.dot(b_inverse, tl.where(m_below, b_lower, 0.0), input_precision=PRECISION)
    return b_inverse - tl.dot(b_below, b_inverse, input_precision=PRECISION)


@triton.jit
def key_products(p_a, p_b, o_row, m_row, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """a b^T [BT, BT] of two tensors of keys, block after block of their features."""
    b_product = _key_block(p_a, p_b, o_row, m_row, 0, K, BK, DTYPE)
    for i_k in range(BK, K, BK):
        b_product += _key_block(p_a, p_b, o_row, m_row, i_k, K, BK, DTYPE)
    return b_product


@triton.jit
def _key_block(p_a, p_b, o_row, m_row, i_k, K: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    o_k = i_k + tl.arange(0, BK)
    b_b = load_tile(p_b, o_row, m_row, o_k, o_k < K)
    return dot(load_tile(p_a, o_row, m_row, o_k, o_k < K), tl.trans(b_b), DTYPE)
