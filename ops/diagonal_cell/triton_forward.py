"""Triton kernels of the forward pass: the loop itself, and the sweeps and corrections of multiple shooting.

What they are for is told in `ops.diagonal_cell.triton`.
"""

# A kernel builds tuples by +, in loops that are unrolled: it knows no starred ones, and a type checker no such loops.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

import triton
import triton.language as tl

from ops.rounding import rounded

# Tokens worked off between two branches. An assembler orders a straight piece of code as it likes, and would issue all
# loads where their registers live shortest: behind the work that is to hide them.
GROUP = tl.constexpr(2)


@triton.jit
def load(p, m, NUM: tl.constexpr, D: tl.constexpr):
    """NUM values of each channel, D apart."""
    values = ()
    for i in tl.static_range(NUM):
        values = values + (tl.load(p + i * D, mask=m, other=0.0),)
    return values


@triton.jit
def store(p, values, m, NUM: tl.constexpr, D: tl.constexpr):
    for i in tl.static_range(NUM):
        tl.store(p + i * D, values[i], mask=m)


@triton.jit
def load_tokens(p_gates, p_restarts, i_t, i_end, NUM_GATES: tl.constexpr, D: tl.constexpr, AHEAD: tl.constexpr):
    """For each of AHEAD tokens from i_t on that lie before i_end: (gates, whether a document starts). As they are in
    memory: a conversion would wait for them."""
    tokens = ()
    for i in tl.static_range(AHEAD):
        m_t = i_t + i < i_end
        gates = ()
        for j in tl.static_range(NUM_GATES):
            gates = gates + (tl.load(p_gates + (i * NUM_GATES + j) * D, mask=m_t, other=0.0),)
        if p_restarts is None:
            tokens = tokens + ((gates,),)
        else:
            tokens = tokens + ((gates, tl.load(p_restarts + i, mask=m_t, other=0)),)
    return tokens


@triton.jit(do_not_specialize=["time", "num_segments", "length", "channels"])
def run(
    p_gates,  # [B, T, NUM_GATES, D]
    p_weights,  # [NUM_WEIGHTS, D]
    p_starts,  # [1 or 2, S, B, NUM_STATES, D]: start states before an even and an odd number of corrections
    p_rounds,  # int32 [B, D]: corrections of a channel, -1 if it did not converge; None with one segment
    p_restarts,  # uint8 [B, T] or None: where documents start
    p_y,  # out [B, T, D]
    p_kept,  # out [B, T, NUM_KEPT, D]: the first NUM_KEPT of the state
    time,
    num_segments,
    length,
    channels,  # B * D
    ADVANCE: tl.constexpr,
    NUM_GATES: tl.constexpr,
    NUM_STATES: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < num_segments.to(tl.int64) * channels
    i_s, i_channel = (o_n // channels).to(tl.int32), o_n % channels
    i_t = i_s * length
    i_end = tl.where(i_s == num_segments - 1, time, i_t + length)
    o_start = o_n // D * (NUM_STATES * D) + o_n % D
    if p_rounds is not None:
        rounds = tl.load(p_rounds + i_channel, mask=m_n, other=0)
        i_end = tl.where(rounds >= 0, i_end, tl.where(i_s == 0, time, i_t))
        odd = (rounds >= 0) & (rounds % 2 == 1)
        o_start += tl.where(odd, num_segments.to(tl.int64) * channels * NUM_STATES, 0)
    i_end = tl.where(m_n, i_end, i_t)
    state = load(p_starts + o_start, m_n, NUM_STATES, D)
    weights = load(p_weights + o_n % D, m_n, NUM_WEIGHTS, D)

    o_token = i_channel // D * time + i_t
    p_gates += o_token * (NUM_GATES * D) + o_n % D
    p_y += o_token * D + o_n % D
    p_kept += o_token * (NUM_KEPT * D) + o_n % D
    if p_restarts is not None:
        p_restarts += o_token
    coming = load_tokens(p_gates, p_restarts, i_t, i_end, NUM_GATES, D, AHEAD)
    most = tl.max(i_end - i_t)
    for done in range(0, most, AHEAD):
        tokens = coming
        p_gates += AHEAD * NUM_GATES * D
        if p_restarts is not None:
            p_restarts += AHEAD
        coming = load_tokens(p_gates, p_restarts, i_t + AHEAD, i_end, NUM_GATES, D, AHEAD)
        for i_group in tl.static_range(0, AHEAD, GROUP):
            if done + i_group < most:
                for i in tl.static_range(i_group, i_group + GROUP):
                    b_gates = ()
                    for j in tl.static_range(NUM_GATES):
                        b_gates = b_gates + (tokens[i][0][j].to(DTYPE),)
                    if p_restarts is not None:
                        before = state
                        state = ()
                        for j in tl.static_range(NUM_STATES):
                            state = state + (tl.where(tokens[i][1] != 0, 0.0, before[j]),)
                    state, _acts = ADVANCE(state, b_gates, weights)
                    m_t = i_t + i < i_end
                    tl.store(p_y + i * D, rounded(state[NUM_STATES - 1], p_y.dtype.element_ty), mask=m_t)
                    for j in tl.static_range(NUM_KEPT):
                        tl.store(p_kept + (i * NUM_KEPT + j) * D, rounded(state[j], p_kept.dtype.element_ty), mask=m_t)
        i_t += AHEAD
        p_y += AHEAD * D
        p_kept += AHEAD * NUM_KEPT * D


@triton.jit(do_not_specialize=["time", "num_segments", "length", "channels"])
def sweep(
    p_gates,  # [B, T, NUM_GATES, D]
    p_weights,  # [NUM_WEIGHTS, D]
    p_starts,  # [S, B, NUM_STATES, D]
    p_rounds,  # int32 [B, D]: -1 for a channel that has not converged
    p_restarts,  # uint8 [B, T] or None
    p_maps,  # out [S - 1, B, NUM_STATES + 1, NUM_STATES, D]: the columns of the Jacobian, then the end state
    time,
    num_segments,
    length,  # of every segment but the last, a multiple of AHEAD
    channels,
    ADVANCE: tl.constexpr,
    SLOPES: tl.constexpr,
    PUSH: tl.constexpr,
    NUM_GATES: tl.constexpr,
    NUM_STATES: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < (num_segments - 1).to(tl.int64) * channels
    i_channel = o_n % channels
    m_n &= tl.load(p_rounds + i_channel, mask=m_n, other=0) < 0
    i_t = (o_n // channels).to(tl.int32) * length
    i_end = tl.where(m_n, i_t + length, i_t)
    state = load(p_starts + o_n // D * (NUM_STATES * D) + o_n % D, m_n, NUM_STATES, D)
    weights = load(p_weights + o_n % D, m_n, NUM_WEIGHTS, D)
    columns = ()
    for j in tl.static_range(NUM_STATES):
        column = ()
        for i in tl.static_range(NUM_STATES):
            column = column + (tl.full([BLOCK], 1.0 if i == j else 0.0, DTYPE),)
        columns = columns + (column,)

    o_token = i_channel // D * time + i_t
    p_gates += o_token * (NUM_GATES * D) + o_n % D
    if p_restarts is not None:
        p_restarts += o_token
    coming = load_tokens(p_gates, p_restarts, i_t, i_end, NUM_GATES, D, AHEAD)
    most = tl.max(i_end - i_t)
    for done in range(0, most, AHEAD):
        tokens = coming
        i_t += AHEAD
        p_gates += AHEAD * NUM_GATES * D
        if p_restarts is not None:
            p_restarts += AHEAD
        coming = load_tokens(p_gates, p_restarts, i_t, i_end, NUM_GATES, D, AHEAD)
        for i_group in tl.static_range(0, AHEAD, GROUP):
            if done + i_group < most:
                for i in tl.static_range(i_group, i_group + GROUP):
                    b_gates = ()
                    for j in tl.static_range(NUM_GATES):
                        b_gates = b_gates + (tokens[i][0][j].to(DTYPE),)
                    before = state
                    if p_restarts is not None:
                        state = ()
                        for j in tl.static_range(NUM_STATES):
                            state = state + (tl.where(tokens[i][1] != 0, 0.0, before[j]),)
                        before = state
                    state, acts = ADVANCE(before, b_gates, weights)
                    slopes = SLOPES(before, acts, weights)
                    pushed = ()
                    for j in tl.static_range(NUM_STATES):
                        column = columns[j]
                        if p_restarts is not None:
                            column = ()
                            for k in tl.static_range(NUM_STATES):
                                column = column + (tl.where(tokens[i][1] != 0, 0.0, columns[j][k]),)
                        pushed = pushed + (PUSH(column, slopes, weights),)
                    columns = pushed
    p_maps += o_n // D * ((NUM_STATES + 1) * NUM_STATES * D) + o_n % D
    for j in tl.static_range(NUM_STATES):
        store(p_maps + j * NUM_STATES * D, columns[j], m_n, NUM_STATES, D)
    store(p_maps + NUM_STATES * NUM_STATES * D, state, m_n, NUM_STATES, D)


@triton.jit(do_not_specialize=["i_round", "num_segments", "channels"])
def correct(
    p_maps,  # [S - 1, B, NUM_STATES + 1, NUM_STATES, D], from `sweep`
    p_starts,  # [S, B, NUM_STATES, D]: what the sweep began from
    p_moved,  # out [S, B, NUM_STATES, D]: what the next one is to begin from
    p_rounds,  # in and out, int32 [B, D]
    p_residual,  # out [B, D]: the largest error of a start state, as estimated
    tolerance,
    i_round,
    num_segments,
    channels,
    NUM_STATES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    NUM_MAP: tl.constexpr = (NUM_STATES + 1) * NUM_STATES
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < channels
    m_n &= tl.load(p_rounds + o_n, mask=m_n, other=0) < 0
    p_maps += o_n // D * (NUM_MAP * D) + o_n % D
    p_starts += o_n // D * (NUM_STATES * D) + o_n % D
    p_moved += o_n // D * (NUM_STATES * D) + o_n % D
    # A state is made of values within [-1, 1] and of where it began. Unbounded corrections grow to overflow.
    initial = load(p_starts, m_n, NUM_STATES, D)
    delta = ()
    for _j in tl.static_range(NUM_STATES):
        delta = delta + (tl.zeros([BLOCK], DTYPE),)
    residual = tl.zeros([BLOCK], DTYPE)
    o_map, o_start = channels.to(tl.int64) * NUM_MAP, channels.to(tl.int64) * NUM_STATES
    for i_first in range(1, num_segments, AHEAD):
        segments = ()
        for i in tl.static_range(AHEAD):
            m_s = m_n & (i_first + i < num_segments)
            p_starts += o_start
            segments = segments + ((load(p_maps, m_s, NUM_MAP, D), load(p_starts, m_s, NUM_STATES, D)),)
            p_maps += o_map
        for i in tl.static_range(AHEAD):
            m_s = m_n & (i_first + i < num_segments)
            p_moved += o_start
            by_delta, start = segments[i]
            has_moved = delta[0] != 0
            for k in tl.static_range(1, NUM_STATES):
                has_moved |= delta[k] != 0
            changes = ()
            is_finite = m_s
            for j in tl.static_range(NUM_STATES):
                change = by_delta[j] * delta[0]
                for k in tl.static_range(1, NUM_STATES):
                    change = tl.fma(by_delta[k * NUM_STATES + j], delta[k], change)
                is_finite &= tl.abs(change) < float("inf")
                changes = changes + (change,)
            # Where the products overflow there is nothing to learn; a start that did not move must not move the next.
            error = tl.where(has_moved & m_s & ~is_finite, float("inf"), tl.zeros([BLOCK], DTYPE))
            delta = ()
            for j in tl.static_range(NUM_STATES):
                end = by_delta[NUM_STATES * NUM_STATES + j]
                bound = tl.maximum(tl.abs(initial[j]), 1.0)
                aim = tl.minimum(tl.maximum(end + tl.where(is_finite, changes[j], 0.0), -bound), bound)
                aim = tl.where(has_moved, aim, end)
                tl.store(p_moved + j * D, aim, mask=m_s)
                error = tl.maximum(error, tl.abs(aim - start[j]))
                delta = delta + (aim - start[j],)
            residual = tl.where(m_s, tl.maximum(residual, error), residual)
    tl.store(p_residual + o_n, residual, mask=m_n)
    tl.store(p_rounds + o_n, tl.zeros([BLOCK], tl.int32) + i_round, mask=m_n & (residual <= tolerance))
