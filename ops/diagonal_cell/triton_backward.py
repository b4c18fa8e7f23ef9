"""Triton kernels of the backward pass, which is linear: lambda_{t-1} = J_t^T (lambda_t + dy_t).

What they are for is told in `ops.diagonal_cell.triton`.
"""

# A kernel builds tuples by +, in loops that are unrolled: it knows no starred ones, and a type checker no such loops.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

import triton
import triton.language as tl

from ops.diagonal_cell.triton_forward import GROUP, load, store
from ops.rounding import rounded


@triton.jit
def load_tokens(
    p_gates,
    p_y,
    p_kept,
    p_dy,
    p_restarts,
    i_t,
    i_begin,
    i_end,
    NUM_GATES: tl.constexpr,
    NUM_STATES: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """For each of AHEAD tokens from i_t on: (gates, state before it, dy, whether a document starts), of tokens in
    [i_begin, i_end).

    i_t is i_begin plus a multiple of AHEAD, which may be negative. Before token 0 the state is left at 0.
    """
    tokens = ()
    i_end = tl.where(i_t < i_begin, i_t, i_end)
    for i in tl.static_range(AHEAD):
        m_t = i_t + i < i_end
        gates = ()
        for j in tl.static_range(NUM_GATES):
            gates = gates + (tl.load(p_gates + (i * NUM_GATES + j) * D, mask=m_t, other=0.0),)
        m_before = m_t
        if i == 0:
            m_before = m_t & (i_t > 0)
        before = ()
        for j in tl.static_range(NUM_STATES):
            if j < NUM_KEPT:
                before = before + (tl.load(p_kept + ((i - 1) * NUM_KEPT + j) * D, mask=m_before, other=0.0),)
            else:
                before = before + (tl.load(p_y + (i - 1) * D, mask=m_before, other=0.0),)
        dy = tl.load(p_dy + i * D, mask=m_t, other=0.0)
        if p_restarts is None:
            tokens = tokens + ((gates, before, dy),)
        else:
            tokens = tokens + ((gates, before, dy, tl.load(p_restarts + i, mask=m_t, other=0)),)
    return tokens


@triton.jit(do_not_specialize=["time", "num_segments", "length", "channels"])
def adjoint(
    p_dy,  # [B, T, D]
    p_ends,  # [S, B, NUM_STATES, D]: gradients of the state after each segment; None for the maps
    p_gates,  # [B, T, NUM_GATES, D]
    p_weights,  # [NUM_WEIGHTS, D]
    p_initial,  # [B, NUM_STATES, D]
    p_restarts,  # uint8 [B, T] or None
    p_y,  # [B, T, D]
    p_kept,  # [B, T, NUM_KEPT, D]
    p_maps,  # out [S - 1, B, NUM_STATES + 1, NUM_STATES, D]: of segments 1 on; the gradient before by that after
    p_dgates,  # out [B, T, NUM_GATES, D]
    p_dweights,  # out [S, B, NUM_WEIGHTS, D]
    p_dinitial,  # out [B, NUM_STATES, D]
    time,
    num_segments,
    length,
    channels,  # B * D
    ADVANCE: tl.constexpr,
    SLOPES: tl.constexpr,
    PULL: tl.constexpr,
    WEIGH: tl.constexpr,
    NUM_GATES: tl.constexpr,
    NUM_STATES: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    DTYPE: tl.constexpr,
    MAPS: tl.constexpr,  # write the maps of segments, else the gradients
):
    NUM_VECTORS: tl.constexpr = NUM_STATES + 1 if MAPS else 1  # the last of them takes in dy
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_s = (o_n // channels).to(tl.int32)
    if MAPS:
        i_s += 1
    m_n = i_s < num_segments
    i_begin = i_s * length
    i_end = tl.where(i_s == num_segments - 1, time, i_begin + length)
    i_end = tl.where(m_n, i_end, i_begin)
    i_b, i_d = o_n % channels // D, o_n % D
    initial = load(p_initial + i_b * (NUM_STATES * D) + i_d, m_n, NUM_STATES, D)
    weights = load(p_weights + i_d, m_n, NUM_WEIGHTS, D)
    vectors = ()
    if MAPS:
        for v in tl.static_range(NUM_VECTORS):
            vector = ()
            for j in tl.static_range(NUM_STATES):
                vector = vector + (tl.full([BLOCK], 1.0 if v == j else 0.0, DTYPE),)
            vectors = vectors + (vector,)
    else:
        vectors = (load(p_ends + o_n // D * (NUM_STATES * D) + i_d, m_n, NUM_STATES, D),)
    dweights = ()
    for _j in tl.static_range(NUM_WEIGHTS):
        dweights = dweights + (tl.zeros([BLOCK], DTYPE),)

    most = tl.max(i_end - i_begin)
    batches = tl.cdiv(most, AHEAD)
    i_t = i_begin + (batches - 1) * AHEAD
    o_token = i_b * time + i_t
    p_gates += o_token * (NUM_GATES * D) + i_d
    p_dgates += o_token * (NUM_GATES * D) + i_d
    p_dy += o_token * D + i_d
    p_y += o_token * D + i_d
    p_kept += o_token * (NUM_KEPT * D) + i_d
    if p_restarts is not None:
        p_restarts += o_token
    coming = load_tokens(
        p_gates, p_y, p_kept, p_dy, p_restarts, i_t, i_begin, i_end, NUM_GATES, NUM_STATES, NUM_KEPT, D, AHEAD
    )
    for done in range(batches):
        tokens = coming
        p_gates -= AHEAD * NUM_GATES * D
        p_dy -= AHEAD * D
        p_y -= AHEAD * D
        p_kept -= AHEAD * NUM_KEPT * D
        if p_restarts is not None:
            p_restarts -= AHEAD
        coming = load_tokens(
            p_gates,
            p_y,
            p_kept,
            p_dy,
            p_restarts,
            i_t - AHEAD,
            i_begin,
            i_end,
            NUM_GATES,
            NUM_STATES,
            NUM_KEPT,
            D,
            AHEAD,
        )
        i_batch = (batches - 1 - done) * AHEAD
        for i_group in tl.static_range(AHEAD - GROUP, -1, -GROUP):
            if i_batch + i_group < most:
                for i in tl.static_range(i_group + GROUP - 1, i_group - 1, -1):
                    m_t = i_t + i < i_end
                    gates = ()
                    for j in tl.static_range(NUM_GATES):
                        gates = gates + (tokens[i][0][j].to(DTYPE),)
                    before = ()
                    for j in tl.static_range(NUM_STATES):
                        b_before = tokens[i][1][j].to(DTYPE)
                        if i == 0:
                            b_before = tl.where(i_t == 0, initial[j], b_before)
                        if p_restarts is not None:
                            b_before = tl.where(tokens[i][3] != 0, 0.0, b_before)
                        before = before + (b_before,)
                    after, acts = ADVANCE(before, gates, weights)
                    slopes = SLOPES(before, acts, weights)
                    pulled = ()
                    for v in tl.static_range(NUM_VECTORS):
                        vector = ()
                        for j in tl.static_range(NUM_STATES):
                            if v == NUM_VECTORS - 1 and j == NUM_STATES - 1:
                                vector = vector + (vectors[v][j] + tokens[i][2].to(DTYPE),)
                            else:
                                vector = vector + (vectors[v][j],)
                        earlier, dgates = PULL(vector, slopes, weights)
                        vector = ()
                        for j in tl.static_range(NUM_STATES):
                            b_earlier = earlier[j]
                            if p_restarts is not None:
                                b_earlier = tl.where(tokens[i][3] != 0, 0.0, b_earlier)
                            vector = vector + (tl.where(m_t, b_earlier, vectors[v][j]),)
                        pulled = pulled + (vector,)
                        if not MAPS:
                            for j in tl.static_range(NUM_GATES):
                                b_dgate = rounded(dgates[j], p_dgates.dtype.element_ty)
                                tl.store(p_dgates + (i * NUM_GATES + j) * D, b_dgate, mask=m_t)
                            # A token beyond the segment has a state of 0 on both sides, and adds nothing.
                            added = WEIGH(dgates, before, after, acts)
                            sums = ()
                            for j in tl.static_range(NUM_WEIGHTS):
                                sums = sums + (dweights[j] + added[j],)
                            dweights = sums
                    vectors = pulled
        i_t -= AHEAD
        p_dgates -= AHEAD * NUM_GATES * D
    if MAPS:
        p_maps += o_n // D * (NUM_VECTORS * NUM_STATES * D) + i_d
        for v in tl.static_range(NUM_VECTORS):
            store(p_maps + v * NUM_STATES * D, vectors[v], m_n, NUM_STATES, D)
    else:
        store(p_dweights + o_n // D * (NUM_WEIGHTS * D) + i_d, dweights, m_n, NUM_WEIGHTS, D)
        store(p_dinitial + i_b * (NUM_STATES * D) + i_d, vectors[0], m_n & (i_s == 0), NUM_STATES, D)


@triton.jit(do_not_specialize=["num_segments", "channels"])
def carry(
    p_maps,  # [S - 1, B, NUM_STATES + 1, NUM_STATES, D], from `adjoint`
    p_dstate,  # [B, NUM_STATES, D]: gradient of the last state
    p_ends,  # out [S, B, NUM_STATES, D]: gradients of the state after each segment
    num_segments,
    channels,
    NUM_STATES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    NUM_MAP: tl.constexpr = (NUM_STATES + 1) * NUM_STATES
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < channels
    o_map, o_end = channels.to(tl.int64) * NUM_MAP, channels.to(tl.int64) * NUM_STATES
    o_state = o_n // D * (NUM_STATES * D) + o_n % D
    vector = load(p_dstate + o_state, m_n, NUM_STATES, D)
    p_ends += (num_segments - 1) * o_end + o_state
    store(p_ends, vector, m_n, NUM_STATES, D)
    p_maps += (num_segments - 2) * o_map + o_n // D * (NUM_MAP * D) + o_n % D
    for i_done in range(1, num_segments, AHEAD):
        maps = ()
        for i in tl.static_range(AHEAD):
            maps = maps + (load(p_maps, m_n & (i_done + i < num_segments), NUM_MAP, D),)
            p_maps -= o_map
        for i in tl.static_range(AHEAD):
            m_s = m_n & (i_done + i < num_segments)
            p_ends -= o_end
            earlier = ()
            for j in tl.static_range(NUM_STATES):
                value = maps[i][NUM_STATES * NUM_STATES + j]
                for k in tl.static_range(NUM_STATES):
                    value = tl.fma(maps[i][k * NUM_STATES + j], vector[k], value)
                earlier = earlier + (value,)
            vector = earlier
            store(p_ends, vector, m_s, NUM_STATES, D)
