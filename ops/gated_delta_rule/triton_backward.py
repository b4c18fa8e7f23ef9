"""The backward kernels of gated_delta_rule: states backward from chunk to chunk, then pairs, keys and decays.

With (I + L) writes = residual the gradient of L is -dresidual writes^T, so the inverse is never differentiated. No
result of a product is transposed to enter another one (Triton before 3.7.1 gets that wrong on Hopper): what a later
product needs transposed goes through memory.
"""

import triton
import triton.language as tl

from ops.dot import dot
from ops.gated_delta_rule.triton_tiles import key_products, load_positions, load_tile, pair_decays, store_tile
from ops.rounding import rounded


@triton.jit(do_not_specialize=["T"])
def adjoint_kernel(
    p_do,
    p_dstate,
    p_q,
    p_k,
    p_beta,
    p_x,
    p_carry,
    p_scores,
    p_dresidual,
    p_dv,
    p_dstates,
    p_dinitial_state,
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
    HAS_DSTATE: tl.constexpr,
):
    """The gradients of the residual and of v [B, T, HV, V], of the state after each chunk [B, HV, N, K, V] and of the
    initial one [B, HV, K, V].

    A program a block of BV value features of a head, from the last chunk to the first.
    """
    NV: tl.constexpr = tl.cdiv(V, BV)
    i_program = tl.program_id(0)
    num_chunks = tl.cdiv(T, BT)
    i_v, i_bh = i_program % NV, i_program // NV
    i_b, i_hv = i_bh // HV, i_bh % HV
    o_r, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_r, m_k, m_v = o_r < BT, o_k < K, o_v < V
    o_state = i_bh.to(tl.int64) * K * V + o_k * V
    b_dstate = tl.zeros((BK, BV), dtype=ACC)
    if HAS_DSTATE:
        b_dstate = load_tile(p_dstate, o_state, m_k, o_v, m_v).to(ACC)
    for i_step in range(num_chunks):
        i_n = num_chunks - 1 - i_step
        i_chunk = i_bh.to(tl.int64) * num_chunks + i_n
        store_tile(p_dstates, i_chunk * K * V + o_k * V, m_k, o_v, m_v, b_dstate)
        o_t = i_n * BT + o_r
        m_t = o_t < T
        o_token = i_b.to(tl.int64) * T + o_t
        o_key, o_value = (o_token * H + i_hv // (HV // H)) * K, (o_token * HV + i_hv) * V
        b_q = load_tile(p_q, o_key, m_t, o_k, m_k)
        b_k = load_tile(p_k, o_key, m_t, o_k, m_k)
        b_do = load_tile(p_do, o_value, m_t, o_v, m_v)
        b_x = load_tile(p_x, i_chunk * BT * BT + o_r * BT, m_r, o_r, m_r)
        b_scores = load_tile(p_scores, i_chunk * BT * BT + o_r * BT, m_r, o_r, m_r)
        b_beta = tl.load(p_beta + o_token * HV + i_hv, mask=m_t, other=0.0).to(ACC)
        b_in = tl.load(p_carry + i_chunk * 2 * BT + o_r)
        b_out = tl.load(p_carry + i_chunk * 2 * BT + BT + o_r)
        b_through = tl.load(p_carry + i_chunk * 2 * BT + BT - 1)
        b_dwrites = SCALE * dot(tl.trans(b_scores), b_do, DTYPE) + b_out[:, None] * dot(b_k, b_dstate, DTYPE)
        b_dresidual = dot(tl.trans(b_x), b_dwrites, DTYPE)
        b_dv = b_beta[:, None] * b_dresidual
        store_tile(p_dresidual, o_value, m_t, o_v, m_v, b_dresidual)
        store_tile(p_dv, o_value, m_t, o_v, m_v, b_dv)
        b_dstate = b_through * b_dstate + dot(tl.trans(b_q), (SCALE * b_in)[:, None] * b_do.to(ACC), DTYPE)
        b_dstate -= dot(tl.trans(b_k), b_in[:, None] * b_dv, DTYPE)
    store_tile(p_dinitial_state, o_state, m_k, o_v, m_v, b_dstate)


@triton.jit(do_not_specialize=["T"])
def pairs_kernel(
    p_do,
    p_k,
    p_v,
    p_log_decay,
    p_beta,
    p_positions,
    p_scores,
    p_writes,
    p_dresidual,
    p_dscores,
    p_dlower,
    p_ways,
    p_dbeta_pairs,
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
    """The gradients of q k^T and k k^T [B, HV, N, BT, BT]; what the pairs contribute to those of beta and of the log
    decays [B, HV, N, BT] (`ways` at s: of the log decay of s + 1).

    A program a chunk and value head. A log decay i lies on the way of the pairs s < i <= t: a sum over the pairs' own
    gradients, no difference of sums.
    """
    i_chunk = tl.program_id(0)
    num_chunks = tl.cdiv(T, BT)
    i_n, i_bh = i_chunk % num_chunks, i_chunk // num_chunks
    i_b, i_hv = i_bh // HV, i_bh % HV
    o_r = tl.arange(0, BT)
    m_r = o_r < BT
    o_t = i_n * BT + o_r
    m_t = o_t < T
    o_token = i_b.to(tl.int64) * T + o_t
    o_value = (o_token * HV + i_hv) * V
    o_square = i_chunk.to(tl.int64) * BT * BT + o_r * BT
    b_dscores = tl.zeros((BT, BT), dtype=ACC)
    b_dlower = tl.zeros((BT, BT), dtype=ACC)
    b_dbeta = tl.zeros((BT,), dtype=ACC)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < V
        b_writes = load_tile(p_writes, o_value, m_t, o_v, m_v)
        b_dresidual = load_tile(p_dresidual, o_value, m_t, o_v, m_v)
        b_dscores += dot(load_tile(p_do, o_value, m_t, o_v, m_v), tl.trans(b_writes), DTYPE)
        b_dlower += dot(b_dresidual, tl.trans(b_writes), DTYPE)
        b_dbeta += tl.sum(b_dresidual.to(ACC) * load_tile(p_v, o_value, m_t, o_v, m_v).to(ACC), axis=1)
    b_log_decay = tl.load(p_log_decay + o_token * HV + i_hv, mask=m_t, other=0.0).to(ACC)
    b_beta = tl.load(p_beta + o_token * HV + i_hv, mask=m_t, other=0.0).to(ACC)
    b_positions = o_r
    if HAS_POSITIONS:
        b_positions = load_positions(p_positions, i_b, i_n, T, BT)
    b_pair = pair_decays(b_log_decay, b_positions, BT, HAS_POSITIONS)
    b_dscores *= SCALE
    b_dpair = b_dscores * load_tile(p_scores, o_square, m_r, o_r, m_r).to(ACC)
    store_tile(p_dscores, o_square, m_r, o_r, m_r, b_dscores * b_pair)
    b_dlower = tl.where(o_r[:, None] > o_r[None, :], -b_dlower, 0.0) * b_pair
    store_tile(p_dlower, o_square, m_r, o_r, m_r, b_dlower * b_beta[:, None])
    b_dlower *= key_products(p_k, p_k, (o_token * H + i_hv // (HV // H)) * K, m_t, K, BT, BK, DTYPE)
    b_dbeta += tl.sum(b_dlower, axis=1)
    b_dpair += b_dlower * b_beta[:, None]
    b_ways = tl.sum(tl.where(o_r[:, None] > o_r[None, :], tl.cumsum(b_dpair, axis=1), 0.0), axis=0)
    tl.store(p_ways + i_chunk.to(tl.int64) * BT + o_r, b_ways)
    tl.store(p_dbeta_pairs + i_chunk.to(tl.int64) * BT + o_r, b_dbeta)


@triton.jit(do_not_specialize=["T"])
def keys_kernel(
    p_do,
    p_q,
    p_k,
    p_beta,
    p_carry,
    p_writes,
    p_states,
    p_dresidual,
    p_dstates,
    p_dscores,
    p_dlower,
    p_dq,
    p_dk,
    p_sums,
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
):
    """The gradients of q and k [B, T, H, K]; sums [B, HV, N, NK, 4, BT] of each of NK blocks of key features.

    The sums are q . d(carry_in q), -k . d(carry_in beta k) and k . d(carry_out k) of each token, and the state's
    gradient times the state, of each key feature. A program a block of BK <= BT key features, a chunk and a key head;
    it takes the value heads of its group one after the other, so that their sum always has the same order.
    """
    NK: tl.constexpr = tl.cdiv(K, BK)
    GROUP: tl.constexpr = HV // H
    i_program = tl.program_id(0)
    num_chunks = tl.cdiv(T, BT)
    i_k, i_key_chunk = i_program % NK, i_program // NK
    i_n, i_bh = i_key_chunk % num_chunks, i_key_chunk // num_chunks
    i_b, i_h = i_bh // H, i_bh % H
    o_r, o_k = tl.arange(0, BT), i_k * BK + tl.arange(0, BK)
    m_r, m_k = o_r < BT, o_k < K
    o_t = i_n * BT + o_r
    m_t = o_t < T
    o_token = i_b.to(tl.int64) * T + o_t
    o_key = (o_token * H + i_h) * K
    b_q = load_tile(p_q, o_key, m_t, o_k, m_k)
    b_k = load_tile(p_k, o_key, m_t, o_k, m_k)
    b_dq = tl.zeros((BT, BK), dtype=ACC)
    b_dk = tl.zeros((BT, BK), dtype=ACC)
    for i_member in range(GROUP):
        i_hv = i_h * GROUP + i_member
        i_chunk = (i_b.to(tl.int64) * HV + i_hv) * num_chunks + i_n
        o_value = (o_token * HV + i_hv) * V
        o_state = i_chunk * K * V + o_k * V
        b_dq_in = tl.zeros((BT, BK), dtype=ACC)
        b_dk_in = tl.zeros((BT, BK), dtype=ACC)
        b_dk_out = tl.zeros((BT, BK), dtype=ACC)
        b_through = tl.zeros((BK,), dtype=ACC)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            m_v = o_v < V
            b_state = load_tile(p_states, o_state, m_k, o_v, m_v)
            b_dstate = load_tile(p_dstates, o_state, m_k, o_v, m_v)
            b_through += tl.sum(b_state.to(ACC) * b_dstate.to(ACC), axis=1)
            b_dq_in += dot(load_tile(p_do, o_value, m_t, o_v, m_v), tl.trans(b_state), DTYPE)
            b_dk_in += dot(load_tile(p_dresidual, o_value, m_t, o_v, m_v), tl.trans(b_state), DTYPE)
            b_dk_out += dot(load_tile(p_writes, o_value, m_t, o_v, m_v), tl.trans(b_dstate), DTYPE)
        b_dq_in *= SCALE
        p_sum = p_sums + (i_chunk * NK + i_k) * 4 * BT
        tl.store(p_sum + o_r, tl.sum(b_dq_in * b_q.to(ACC), axis=1))
        tl.store(p_sum + BT + o_r, -tl.sum(b_dk_in * b_k.to(ACC), axis=1))
        tl.store(p_sum + 2 * BT + o_r, tl.sum(b_dk_out * b_k.to(ACC), axis=1))
        tl.store(p_sum + 3 * BT + tl.arange(0, BK), b_through)
        b_in = tl.load(p_carry + i_chunk * 2 * BT + o_r)
        b_out = tl.load(p_carry + i_chunk * 2 * BT + BT + o_r)
        b_beta = tl.load(p_beta + o_token * HV + i_hv, mask=m_t, other=0.0).to(ACC)
        b_dq += b_in[:, None] * b_dq_in
        b_dk += b_out[:, None] * b_dk_out - (b_in * b_beta)[:, None] * b_dk_in
        b_dscores = load_tile(p_dscores, i_chunk * BT * BT + o_r * BT, m_r, o_r, m_r)
        b_dlower = load_tile(p_dlower, i_chunk * BT * BT + o_r * BT, m_r, o_r, m_r)
        b_dq += dot(b_dscores, b_k, DTYPE)
        b_dk += dot(tl.trans(b_dscores), b_q, DTYPE)
        b_dk += dot(b_dlower, b_k, DTYPE)
        b_dk += dot(tl.trans(b_dlower), b_k, DTYPE)
    store_tile(p_dq, o_key, m_t, o_k, m_k, b_dq)
    store_tile(p_dk, o_key, m_t, o_k, m_k, b_dk)


@triton.jit(do_not_specialize=["T"])
def decays_kernel(
    p_beta,
    p_carry,
    p_ways,
    p_dbeta_pairs,
    p_sums,
    p_dlog_decay,
    p_dbeta,
    T,
    HV: tl.constexpr,
    NK: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradients of log_decay and beta [B, T, HV], of all that the other kernels summed. A program a chunk and value
    head."""
    i_chunk = tl.program_id(0)
    num_chunks = tl.cdiv(T, BT)
    i_n, i_bh = i_chunk % num_chunks, i_chunk // num_chunks
    o_r, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_t = i_n * BT + o_r
    m_t = o_t < T
    o_token = (i_bh // HV).to(tl.int64) * T + o_t
    b_query = tl.zeros((BT,), dtype=ACC)
    b_key_in = tl.zeros((BT,), dtype=ACC)
    b_key_out = tl.zeros((BT,), dtype=ACC)
    b_through = tl.zeros((BK,), dtype=ACC)
    for i_k in range(NK):
        p_sum = p_sums + (i_chunk.to(tl.int64) * NK + i_k) * 4 * BT
        b_query += tl.load(p_sum + o_r)
        b_key_in += tl.load(p_sum + BT + o_r)
        b_key_out += tl.load(p_sum + 2 * BT + o_r)
        b_through += tl.load(p_sum + 3 * BT + o_k)
    p_carry += i_chunk.to(tl.int64) * 2 * BT
    b_in = tl.load(p_carry + o_r)
    b_beta = tl.load(p_beta + o_token * HV + i_bh % HV, mask=m_t, other=0.0).to(ACC)
    b_key_in *= b_in
    b_dbeta = tl.load(p_dbeta_pairs + i_chunk.to(tl.int64) * BT + o_r) + b_key_in
    b_into = b_query * b_in + b_key_in * b_beta
    b_out = b_key_out * tl.load(p_carry + BT + o_r)
    # Of the log decay of token i (columns): the ways into tokens t >= i, out of tokens s < i, through, and inside.
    m_before = o_r[:, None] < o_r[None, :]
    b_dlog_decay = tl.sum(tl.where(m_before, b_out[:, None], b_into[:, None]), axis=0)
    b_dlog_decay += tl.sum(b_through, axis=0) * tl.load(p_carry + BT - 1)
    b_dlog_decay += tl.load(p_ways + i_chunk.to(tl.int64) * BT + o_r - 1, mask=o_r > 0, other=0.0)
    o_token = o_token * HV + i_bh % HV
    tl.store(p_dlog_decay + o_token, rounded(b_dlog_decay, p_dlog_decay.dtype.element_ty), mask=m_t)
    tl.store(p_dbeta + o_token, rounded(b_dbeta, p_dbeta.dtype.element_ty), mask=m_t)
