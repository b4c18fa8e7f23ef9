"""The forward kernels of gated_delta_rule: each chunk's inverse, the states from chunk to chunk, the outputs."""

import triton
import triton.language as tl

from ops.dot import dot
from ops.gated_delta_rule.triton_tiles import (
    carry_decays,
    key_products,
    load_positions,
    load_tile,
    pair_decays,
    store_tile,
    unit_lower_inverse,
)


@triton.jit(do_not_specialize=["T"])
def solve_kernel(
    p_k,
    p_log_decay,
    p_beta,
    p_positions,
    p_x,
    p_carry,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """x [B, HV, N, BT, BT] = (I + L)^-1 and carry [B, HV, N, 2, BT], the decays into and out of each chunk.

    A program a chunk and value head.
    """
    i_chunk = tl.program_id(0)
    num_chunks = tl.cdiv(T, BT)
    i_n, i_bh = i_chunk % num_chunks, i_chunk // num_chunks
    i_b, i_hv = i_bh // HV, i_bh % HV
    o_r = tl.arange(0, BT)
    o_t = i_n * BT + o_r
    m_t = o_t < T
    o_token = i_b.to(tl.int64) * T + o_t
    b_log_decay = tl.load(p_log_decay + o_token * HV + i_hv, mask=m_t, other=0.0).to(ACC)
    b_beta = tl.load(p_beta + o_token * HV + i_hv, mask=m_t, other=0.0).to(ACC)
    b_positions = o_r
    if HAS_POSITIONS:
        b_positions = load_positions(p_positions, i_b, i_n, T, BT)
    b_in, b_out = carry_decays(b_log_decay, b_positions, BT, HAS_POSITIONS)
    p_carry += i_chunk.to(tl.int64) * 2 * BT
    tl.store(p_carry + o_r, b_in)
    tl.store(p_carry + BT + o_r, b_out)

    b_lower = key_products(p_k, p_k, (o_token * H + i_hv // (HV // H)) * K, m_t, K, BT, BK, DTYPE)
    b_lower *= pair_decays(b_log_decay, b_positions, BT, HAS_POSITIONS) * b_beta[:, None]
    b_lower = tl.where(o_r[:, None] > o_r[None, :], b_lower, 0.0)
    b_x = unit_lower_inverse(b_lower, BT, PRECISION)
    store_tile(p_x + i_chunk.to(tl.int64) * BT * BT, o_r * BT, o_r < BT, o_r, o_r < BT, b_x)


@triton.jit(do_not_specialize=["T"])
def states_kernel(
    p_k,
    p_v,
    p_beta,
    p_x,
    p_carry,
    p_initial_state,
    p_writes,
    p_states,
    p_final_state,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
):
    """What every token writes [B, T, HV, V], the state before each chunk [B, HV, N, K, V] and the last [B, HV, K, V].

    A program a block of BV value features of a head, chunk after chunk; it keeps its state [BK, BV] in registers.
    Decays scale the rows of results, not the operands, so that narrow keys enter the products unrounded.
    """
    NV: tl.constexpr = tl.cdiv(V, BV)
    i_program = tl.program_id(0)
    num_chunks = tl.cdiv(T, BT)
    i_v, i_bh = i_program % NV, i_program // NV
    i_b, i_hv = i_bh // HV, i_bh % HV
    o_r, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_r, m_k, m_v = o_r < BT, o_k < K, o_v < V
    o_state = i_bh.to(tl.int64) * K * V + o_k * V
    b_state = tl.zeros((BK, BV), dtype=ACC)
    if HAS_INITIAL_STATE:
        b_state = load_tile(p_initial_state, o_state, m_k, o_v, m_v).to(ACC)
    for i_n in range(num_chunks):
        i_chunk = i_bh.to(tl.int64) * num_chunks + i_n
        store_tile(p_states, i_chunk * K * V + o_k * V, m_k, o_v, m_v, b_state)
        o_t = i_n * BT + o_r
        m_t = o_t < T
        o_token = i_b.to(tl.int64) * T + o_t
        b_k = load_tile(p_k, (o_token * H + i_hv // (HV // H)) * K, m_t, o_k, m_k)
        b_v = load_tile(p_v, (o_token * HV + i_hv) * V, m_t, o_v, m_v).to(ACC)
        b_x = load_tile(p_x, i_chunk * BT * BT + o_r * BT, m_r, o_r, m_r)
        b_beta = tl.load(p_beta + o_token * HV + i_hv, mask=m_t, other=0.0).to(ACC)
        b_in = tl.load(p_carry + i_chunk * 2 * BT + o_r)
        b_out = tl.load(p_carry + i_chunk * 2 * BT + BT + o_r)
        b_through = tl.load(p_carry + i_chunk * 2 * BT + BT - 1)
        b_residual = b_beta[:, None] * (b_v - b_in[:, None] * dot(b_k, b_state, DTYPE))
        b_writes = dot(b_x, b_residual, DTYPE)
        store_tile(p_writes, (o_token * HV + i_hv) * V, m_t, o_v, m_v, b_writes)
        b_state = b_through * b_state + dot(tl.trans(b_k), b_out[:, None] * b_writes, DTYPE)
    store_tile(p_final_state, o_state, m_k, o_v, m_v, b_state)


@triton.jit(do_not_specialize=["T"])
def outputs_kernel(
    p_q,
    p_k,
    p_log_decay,
    p_positions,
    p_carry,
    p_writes,
    p_states,
    p_scores,
    p_o,
    T,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """o [B, T, HV, V], and scores [B, HV, N, BT, BT] = pair (q k^T) for the backward.

    A program a chunk and block of BV value features of a head; all of a chunk compute its scores, one stores them.
    """
    NV: tl.constexpr = tl.cdiv(V, BV)
    i_program = tl.program_id(0)
    num_chunks = tl.cdiv(T, BT)
    i_v, i_chunk = i_program % NV, i_program // NV
    i_n, i_bh = i_chunk % num_chunks, i_chunk // num_chunks
    i_b, i_hv = i_bh // HV, i_bh % HV
    o_r, o_v = tl.arange(0, BT), i_v * BV + tl.arange(0, BV)
    m_r, m_v = o_r < BT, o_v < V
    o_t = i_n * BT + o_r
    m_t = o_t < T
    o_token = i_b.to(tl.int64) * T + o_t
    o_key = (o_token * H + i_hv // (HV // H)) * K
    o_value = (o_token * HV + i_hv) * V
    b_log_decay = tl.load(p_log_decay + o_token * HV + i_hv, mask=m_t, other=0.0).to(ACC)
    b_positions = o_r
    if HAS_POSITIONS:
        b_positions = load_positions(p_positions, i_b, i_n, T, BT)
    b_scores = key_products(p_q, p_k, o_key, m_t, K, BT, BK, DTYPE)
    b_scores *= pair_decays(b_log_decay, b_positions, BT, HAS_POSITIONS)
    store_tile(p_scores + i_chunk.to(tl.int64) * BT * BT, o_r * BT, m_r & (i_v == 0), o_r, m_r, b_scores)
    b_o = tl.zeros((BT, BV), dtype=ACC)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_q = load_tile(p_q, o_key, m_t, o_k, o_k < K)
        b_state = load_tile(p_states, i_chunk.to(tl.int64) * K * V + o_k * V, o_k < K, o_v, m_v)
        b_o += dot(b_q, b_state, DTYPE)
    b_o *= tl.load(p_carry + i_chunk.to(tl.int64) * 2 * BT + o_r)[:, None]
    b_o += dot(b_scores, load_tile(p_writes, o_value, m_t, o_v, m_v), DTYPE)
    store_tile(p_o, o_value, m_t, o_v, m_v, SCALE * b_o)
