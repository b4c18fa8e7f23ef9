"""gated_linear_attention as Triton kernels over chunks of 64 tokens, forward and backward.

Pairs (query t, key s < t) of a chunk are found by halving, as in chunked.py: at level b = 1, 2, 4, ... 32 queries of
right halves of blocks of 2b tokens carry the decays from the start of their half to t, keys of left halves those after
s to their half's end, and one tensor-core product over the whole chunk, masked to these pairs, gives their scores.
Between levels queries and keys take on the total decay of the half beside their own. After the last level the same
queries read the state carried into the chunk, and the same keys feed the one carried out. No decay is divided or
subtracted, exp is taken once of each log decay, and padding is masked before it. A document's first token is a decay
of exactly 0.

    _chunks     every chunk on its own: scores of its pairs [C, C], queries and keys after the last level, total decay
    _carry      serial over chunks: the state before each chunk; in reverse the gradient of the state after it
    _apply      every chunk on its own: o from scores, v, queries and states; dv from scores, do, keys and gradients
    _gradients  every chunk and block of keys on its own: gradients of q, k and log_decay

d log_decay_i sums over the pairs s < i <= t: at the level where t and s meet, what lies from i on among the queries of
i's half, or before i among its keys. These are sums of the terms that count, never a difference of larger ones.

Operands of products are rounded to the dtype of v, sums are fp32. What passes from kernel to kernel as an
operand alone is stored in that dtype, which costs nothing. The backward stores states and their gradients in fp32:
their elementwise product is the gradient of a chunk's total decay. It recomputes all but the scores, which are kept, C
numbers for each token and head.

Designed for an H100: 4 warps, one grid axis for any batch and length, launch sizes that depend on head dims alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.dot import dot
from ops.gated_linear_attention.triton_tiles import (
    beside,
    load_decays,
    load_tile,
    masked_sums,
    store_tile,
)
from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.rounding import TYPES, rounded

LEVELS = tl.constexpr(6)
CHUNK = 2**LEVELS.value
# The most key and value channels of a program's tiles: 4 warps hold a [64, 64] of fp32 in 32 registers a thread. Of
# narrower tiles _gradients has nine alive; _apply has one, wide enough to read its queries once.
CHUNKS_BLOCKS = {"BK": 64}
CARRY_BLOCKS = {"BK": 64, "BV": 64}
APPLY_BLOCKS = {"BK": 64, "BV": 128}
GRADIENTS_BLOCKS = {"BK": 32, "BV": 64}
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the last state [B, H, K, V]; arguments as in `ops.gated_linear_attention`.

    Products have operands of v's dtype. Raises ValueError for float16, and for float64 on a GPU.
    """
    for name, tensor in {"q": q, "k": k, "v": v, "log_decay": log_decay}.items():
        if tensor.dtype not in DTYPES or (tensor.dtype == torch.float64 and tensor.is_cuda):
            raise ValueError(
                f"gated_linear_attention: {name} has dtype {tensor.dtype}; must be bfloat16 or float32 for impl "
                f"'triton'; choose 'chunked'"
            )
    dtype = accumulation_dtype(q, k, v, log_decay)
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1], dtype=dtype)
    starts = None if layout is None else layout.starts
    o, state, _ = forward(q, k, v, log_decay, initial_state.to(dtype), starts, scale)
    return o, state


@torch.library.custom_op("rondo::gated_linear_attention_triton_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last state, and the scores of each token with those of its chunk [B, T, H, C]; `initial_state` comes in
    the dtype of accumulation, starts is bool [B, T]."""
    q, k, v, log_decay, starts = _contiguous(q, k, v, log_decay, starts)
    scores = q.new_empty(*q.shape[:3], CHUNK, dtype=_operand_dtype(q, k, v))
    with torch.cuda.device_of(q):
        queries, keys, totals = _run_chunks(q, k, v, log_decay, starts, scale, scores)
        states, last = _run_carry(keys, v, totals, initial_state, keys.dtype, reverse=False)
        o = _run_apply(scores, v, queries, states, transposed=False)
    return o, last, scores


@torch.library.custom_op("rondo::gated_linear_attention_triton_backward", mutates_args=())
def backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    scores: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial state, of those of o and the last state."""
    q, k, v, log_decay, starts, do = _contiguous(q, k, v, log_decay, starts, do)
    dq, dk, dlog_decay = (torch.empty_like(z) for z in (q, k, log_decay))
    blocks = _blocks(GRADIENTS_BLOCKS, q.shape[-1], v.shape[-1])
    with torch.cuda.device_of(q):
        queries, keys, totals = _run_chunks(q, k, v, log_decay, starts, scale, None)
        states, _ = _run_carry(keys, v, totals, initial_state, dstate.dtype, reverse=False)
        dstates, dinitial = _run_carry(queries, do, totals, dstate, dstate.dtype, reverse=True)
        dv = _run_apply(scores, do, keys, dstates, transposed=True)
        _gradients[(_num_chunks(q) * triton.cdiv(q.shape[-1], blocks["BK"]),)](
            q,
            k,
            v,
            log_decay,
            starts,
            do,
            states,
            dstates,
            dq,
            dk,
            dlog_decay,
            scale,
            *q.shape[1:3],
            K=q.shape[-1],
            V=v.shape[-1],
            C=CHUNK,
            ACC=TYPES[initial_state.dtype],
            DTYPE=TYPES[scores.dtype],
            HAS_STARTS=starts is not None,
            **blocks,
            num_warps=4,
        )
    return dq, dk, dv, dlog_decay, dinitial


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, scale: float, scores: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as they meet the states [B, T, H, K], total decay of each chunk [B, H, T/C, K]; writes scores
    [B, T, H, C] if asked."""
    batch, _, heads, dim = q.shape
    dtype = _operand_dtype(q, k, v)
    accumulated = accumulation_dtype(q, k, v, log_decay)
    queries, keys = (torch.empty_like(z, dtype=dtype) for z in (q, k))
    totals = q.new_empty(batch, heads, triton.cdiv(q.shape[1], CHUNK), dim, dtype=accumulated)
    _chunks[(_num_chunks(q),)](
        q,
        k,
        log_decay,
        starts,
        scores,
        queries,
        keys,
        totals,
        scale,
        *q.shape[1:3],
        K=dim,
        C=CHUNK,
        ACC=TYPES[accumulated],
        DTYPE=TYPES[dtype],
        HAS_STARTS=starts is not None,
        HAS_SCORES=scores is not None,
        **_blocks(CHUNKS_BLOCKS, dim, v.shape[-1]),
        num_warps=4,
    )
    return queries, keys, totals


def _run_carry(
    x: Tensor, y: Tensor, totals: Tensor, state: Tensor, dtype: torch.dtype, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What each chunk starts from [B, H, T/C, K, V] in `dtype`, and what the last leaves, from `state` [B, H, K, V]:
    a chunk turns it into total * state + x^T y. In reverse the last chunk goes first."""
    dim, values = x.shape[-1], y.shape[-1]
    states = x.new_empty(*totals.shape, values, dtype=dtype)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    blocks = _blocks(CARRY_BLOCKS, dim, values)
    programs = state.shape[0] * state.shape[1] * triton.cdiv(dim, blocks["BK"]) * triton.cdiv(values, blocks["BV"])
    _carry[(programs,)](
        x,
        y,
        totals,
        state.contiguous(),
        states,
        last,
        *x.shape[1:3],
        K=dim,
        V=values,
        C=CHUNK,
        ACC=TYPES[state.dtype],
        DTYPE=TYPES[x.dtype],
        REVERSE=reverse,
        **blocks,
        num_warps=4,
        num_stages=2,
    )
    return states, last


def _run_apply(scores: Tensor, y: Tensor, x: Tensor, states: Tensor, *, transposed: bool) -> Tensor:
    """scores @ y + x @ states for each chunk, scores transposed or not: [B, T, H, V] in y's dtype."""
    dim, values = states.shape[-2:]
    out = torch.empty_like(y)
    blocks = _blocks(APPLY_BLOCKS, dim, values)
    _apply[(_num_chunks(x) * triton.cdiv(values, blocks["BV"]),)](
        scores,
        y,
        x,
        states,
        out,
        *x.shape[1:3],
        K=dim,
        V=values,
        C=CHUNK,
        ACC=TYPES[torch.promote_types(x.dtype, torch.float32)],
        DTYPE=TYPES[x.dtype],
        TRANSPOSED=transposed,
        **blocks,
        num_warps=4,
        num_stages=2,
    )
    return out


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if z is None else z.contiguous() for z in tensors]


def _operand_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """That of v: HGRN2 forms its keys in fp32, beside values and queries in bf16."""
    return torch.float64 if accumulation_dtype(q, k, v) == torch.float64 else v.dtype


def _num_chunks(q: Tensor) -> int:
    return q.shape[0] * q.shape[2] * triton.cdiv(q.shape[1], CHUNK)


def _blocks(most: dict[str, int], keys: int, values: int) -> dict[str, int]:
    """Powers of two from 16, a tensor core's least, to `most`."""
    sizes = {"BK": keys, "BV": values}
    return {name: min(limit, max(16, triton.next_power_of_2(sizes[name]))) for name, limit in most.items()}


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor, starts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = q.new_empty(*q.shape[:3], CHUNK, dtype=_operand_dtype(q, k, v))
    return v.new_empty(v.shape), initial_state.new_empty(initial_state.shape), scores


@backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    scores: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(z.new_empty(z.shape) for z in (q, k, v, log_decay, initial_state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, initial_state, starts, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # or the scores would get a gradient of zeros as large as they are
    ctx.save_for_backward(q, k, v, log_decay, initial_state, output[2], starts)


def _autograd(ctx: Any, do: Tensor | None, dstate: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial_state, scores, starts = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dstate = torch.zeros_like(initial_state) if dstate is None else dstate
    return *backward(do, dstate, q, k, v, log_decay, initial_state, scores, starts, ctx.scale), None, None


forward.register_autograd(_autograd, setup_context=_setup_context)


@triton.jit(do_not_specialize=["T"])
def _chunks(
    p_q,
    p_k,
    p_log_decay,
    p_starts,
    p_scores,
    p_queries,
    p_keys,
    p_totals,
    scale,
    T,
    H,
    K: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    BK: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    num = tl.cdiv(T, C)
    i_c, i_bh = i_p % num, i_p // num
    i_b, i_h = i_bh // H, i_bh % H
    o_r = tl.arange(0, C)
    o_t = i_c * C + o_r
    m_t = o_t < T
    b_scores = tl.zeros([C, C], dtype=ACC)
    b_itself = tl.zeros([C], dtype=ACC)
    for i_k in range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_tile(p_q, i_b, i_h, o_t, m_t, o_k, T, H, K, ACC) * scale
        b_k = load_tile(p_k, i_b, i_h, o_t, m_t, o_k, T, H, K, ACC)
        b_total = load_decays(p_log_decay, p_starts, i_b, i_h, o_t, m_t, o_k, T, H, K, ACC, DTYPE, HAS_STARTS)
        b_itself += tl.sum(b_q * b_k, 1)
        b_q *= b_total
        for i in range(LEVELS):
            i_half = o_r >> i
            m_right = (i_half & 1 == 1)[:, None]
            if HAS_SCORES:
                # Queries of right halves and keys of left halves are both operands of one product in one tile.
                b_both = tl.where(m_right, b_q, b_k)
                i_left = tl.where(i_half & 1 == 1, i_half - 1, -1)
                b_product = dot(b_both, tl.trans(b_both), DTYPE)
                b_scores += tl.where(i_left[:, None] == i_half[None, :], b_product, 0.0)
            b_other = beside(b_total, i, C, BK)
            b_q = tl.where(m_right, b_q * b_other, b_q)
            b_k = tl.where(m_right, b_k, b_k * b_other)
            b_total *= b_other
        store_tile(p_queries, b_q, i_b, i_h, o_t, m_t, o_k, T, H, K)
        store_tile(p_keys, b_k, i_b, i_h, o_t, m_t, o_k, T, H, K)
        # All rows of b_total are the same: the first is stored.
        o_totals = (i_bh * num + i_c) * K + o_k[None, :] + o_r[:, None] * 0
        tl.store(p_totals + o_totals, b_total, mask=(o_r == 0)[:, None] & (o_k < K)[None, :])
    if HAS_SCORES:
        b_scores += tl.where(o_r[:, None] == o_r[None, :], b_itself[:, None], 0.0)
        store_tile(p_scores, b_scores, i_b, i_h, o_t, m_t, o_r, T, H, C)


@triton.jit(do_not_specialize=["T"])
def _carry(
    p_x,
    p_y,
    p_totals,
    p_first,
    p_states,
    p_last,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_k, i_bh = i_p % NV, i_p // NV % NK, i_p // (NV * NK)
    i_b, i_h = i_bh // H, i_bh % H
    o_k, o_v = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    num = tl.cdiv(T, C)
    b_state = tl.load(p_first + i_bh * K * V + o_s, mask=m_s, other=0.0)
    for i in range(num):
        i_c = num - 1 - i if REVERSE else i
        i_s = i_bh * num + i_c
        tl.store(p_states + i_s * K * V + o_s, rounded(b_state, p_states.dtype.element_ty), mask=m_s)
        o_r = tl.arange(0, C).to(tl.int64)
        # The product sums rows in order: those that decays leave largest, beside the border, come last.
        o_t = i_c * C + (C - 1 - o_r if REVERSE else o_r)
        m_t = o_t < T
        b_x = load_tile(p_x, i_b, i_h, o_t, m_t, o_k, T, H, K, DTYPE)
        b_y = load_tile(p_y, i_b, i_h, o_t, m_t, o_v, T, H, V, DTYPE)
        b_total = tl.load(p_totals + i_s * K + o_k, mask=o_k < K, other=0.0)
        b_state = b_state * b_total[:, None] + dot(tl.trans(b_x), b_y, DTYPE)
    tl.store(p_last + i_bh * K * V + o_s, b_state, mask=m_s)


@triton.jit(do_not_specialize=["T"])
def _apply(
    p_scores,
    p_y,
    p_x,
    p_states,
    p_out,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0).to(tl.int64)
    num = tl.cdiv(T, C)
    i_v, i_c, i_bh = i_p % NV, i_p // NV % num, i_p // (NV * num)
    i_b, i_h = i_bh // H, i_bh % H
    o_r = tl.arange(0, C)
    o_t, o_v = i_c * C + o_r, i_v * BV + tl.arange(0, BV)
    m_t = o_t < T
    if TRANSPOSED:  # loaded as such
        o_scores = ((i_b * T + o_t[None, :]) * H + i_h) * C + o_r[:, None]
        b_scores = tl.load(p_scores + o_scores, mask=m_t[None, :], other=0.0)
    else:
        b_scores = load_tile(p_scores, i_b, i_h, o_t, m_t, o_r, T, H, C, DTYPE)
    b_y = load_tile(p_y, i_b, i_h, o_t, m_t, o_v, T, H, V, DTYPE)
    b_out = dot(b_scores, b_y, DTYPE)
    for i_k in range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_x = load_tile(p_x, i_b, i_h, o_t, m_t, o_k, T, H, K, DTYPE)
        o_s = (i_bh * num + i_c) * K * V + o_k[:, None] * V + o_v[None, :]
        b_state = tl.load(p_states + o_s, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
        b_out += dot(b_x, b_state, DTYPE)
    store_tile(p_out, b_out, i_b, i_h, o_t, m_t, o_v, T, H, V)


@triton.jit(do_not_specialize=["T"])
def _gradients(
    p_q,
    p_k,
    p_v,
    p_log_decay,
    p_starts,
    p_do,
    p_states,
    p_dstates,
    p_dq,
    p_dk,
    p_dlog_decay,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0).to(tl.int64)
    num = tl.cdiv(T, C)
    i_k, i_c, i_bh = i_p % NK, i_p // NK % num, i_p // (NK * num)
    i_b, i_h = i_bh // H, i_bh % H
    o_r = tl.arange(0, C)
    o_t, o_k = i_c * C + o_r, i_k * BK + tl.arange(0, BK)
    m_t = o_t < T
    b_dscores = tl.zeros([C, C], dtype=ACC)
    b_dscores_t = tl.zeros([C, C], dtype=ACC)  # of products of its own: not the transpose of an accumulator (fla 640)
    b_itself = tl.zeros([C], dtype=ACC)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_v = load_tile(p_v, i_b, i_h, o_t, m_t, o_v, T, H, V, DTYPE)
        b_do = load_tile(p_do, i_b, i_h, o_t, m_t, o_v, T, H, V, DTYPE)
        b_dscores += dot(b_do, tl.trans(b_v), DTYPE)
        b_dscores_t += dot(b_v, tl.trans(b_do), DTYPE)
        b_itself += tl.sum(b_do.to(ACC) * b_v.to(ACC), 1)
    # Of query and key, whichever is the row: symmetric.
    b_dscores = tl.where(o_r[:, None] > o_r[None, :], b_dscores, b_dscores_t)

    b_q = load_tile(p_q, i_b, i_h, o_t, m_t, o_k, T, H, K, ACC) * scale
    b_k = load_tile(p_k, i_b, i_h, o_t, m_t, o_k, T, H, K, ACC)
    b_total = load_decays(p_log_decay, p_starts, i_b, i_h, o_t, m_t, o_k, T, H, K, ACC, DTYPE, HAS_STARTS)
    b_prefix = b_total
    b_suffix = tl.full([C, BK], 1.0, dtype=ACC)
    b_dq = b_itself[:, None] * b_k
    b_dk = b_itself[:, None] * b_q
    b_dlog_decay = tl.zeros([C, BK], dtype=ACC)
    for i in range(LEVELS):
        i_half = o_r >> i
        m_right = (i_half & 1 == 1)[:, None]
        b_reach = tl.where(m_right, b_prefix, b_suffix)
        b_both = tl.where(m_right, b_q, b_k) * b_reach  # queries of right halves, keys of left halves
        b_dboth = dot(tl.where((i_half ^ 1)[:, None] == i_half[None, :], b_dscores, 0.0), b_both, DTYPE)
        # The decay of a token in a right half counts for queries from it on, that in a left half for keys before it.
        o_low = tl.where(i_half & 1 == 1, o_r, i_half << i)
        o_end = tl.where(i_half & 1 == 1, (i_half + 1) << i, o_r)
        m_counts = (o_low[:, None] <= o_r[None, :]) & (o_r[None, :] < o_end[:, None])
        b_dlog_decay += masked_sums(m_counts, b_dboth * b_both, ACC, DTYPE)
        b_dboth *= b_reach
        b_dq += tl.where(m_right, b_dboth, 0.0)
        b_dk += tl.where(m_right, 0.0, b_dboth)
        b_other = beside(b_total, i, C, BK)
        b_prefix = tl.where(m_right, b_prefix * b_other, b_prefix)
        b_suffix = tl.where(m_right, b_suffix, b_suffix * b_other)
        b_total *= b_other

    b_dqueries = tl.zeros([C, BK], dtype=ACC)
    b_dkeys = tl.zeros([C, BK], dtype=ACC)
    b_dtotal = tl.zeros([BK], dtype=ACC)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_v = load_tile(p_v, i_b, i_h, o_t, m_t, o_v, T, H, V, DTYPE)
        b_do = load_tile(p_do, i_b, i_h, o_t, m_t, o_v, T, H, V, DTYPE)
        o_s = (i_bh * num + i_c) * K * V + o_k[None, :] * V + o_v[:, None]
        m_s = (o_k < K)[None, :] & (o_v < V)[:, None]
        b_state = tl.load(p_states + o_s, mask=m_s, other=0.0)  # transposed, [BV, BK]
        b_dstate = tl.load(p_dstates + o_s, mask=m_s, other=0.0)
        b_dqueries += dot(b_do, b_state, DTYPE)
        b_dkeys += dot(b_v, b_dstate, DTYPE)
        b_dtotal += tl.sum(b_state.to(ACC) * b_dstate.to(ACC), 0)
    b_dqueries *= b_prefix
    b_dkeys *= b_suffix
    b_dlog_decay += b_dtotal[None, :] * b_total
    b_dlog_decay += masked_sums(o_r[:, None] <= o_r[None, :], b_q * b_dqueries, ACC, DTYPE)
    b_dlog_decay += masked_sums(o_r[:, None] > o_r[None, :], b_k * b_dkeys, ACC, DTYPE)
    store_tile(p_dq, (b_dq + b_dqueries) * scale, i_b, i_h, o_t, m_t, o_k, T, H, K)
    store_tile(p_dk, b_dk + b_dkeys, i_b, i_h, o_t, m_t, o_k, T, H, K)
    store_tile(p_dlog_decay, b_dlog_decay, i_b, i_h, o_t, m_t, o_k, T, H, K)
