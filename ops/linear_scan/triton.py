"""linear_scan on a GPU: one warp walks 64 channels of a row through time, a single pass over memory.

Each thread holds two neighbouring channels, so a step is one line of memory, one exponential and one fused
multiply-add a channel, without any exchange between threads: the order of the sums is that of the time loop. What makes
it fast is distance: the loads of the next 32 tokens are always in flight, which is enough for the memory of an H100
from about 128 warps on. Where B * D is smaller, time is cut into segments: a first kernel runs every segment from a
zero state and keeps only the product of its decays and where it ends; each program of the second combines those of the
segments before its own. The number of segments is an argument like any other, and compiles nothing anew.

The backward walks from the last token to the first (formulas in `chunked.py`). It computes the decays again and reads
h_{t-1} from y as it was returned: for bf16 that is one rounding of one factor of dlog_decay, as large as the rounding
of a bf16 result, and no state has to be kept or computed a second time. With bf16 x and fp32 log_decay the forward
moves 8 bytes an element and the backward 14 (segments: 14 and 20), with bf16 log_decay 6 and 10.

Documents come as one word of bits for every 16 tokens, which a warp reads an iteration ahead of its use.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.exact_exp import exact_exp
from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.rounding import TYPES, rounded

# Tokens of one iteration and of one word of reset bits; channels of a program, two for each thread of its one warp:
# asynchronous copies move at least 4 bytes, two bf16. Three stages keep two iterations, 32 tokens, in flight.
BT = 16
BD = 64
STAGES = tl.constexpr(3)
LOG2_E = tl.constexpr(1.4426950408889634)

# Warps that draw all the bandwidth of an H100 (132 multiprocessors, 1.8 MB in flight, 12 kB a warp are 150), and how
# many to aim for where time has to be cut; a segment is long against its warm-up of one memory latency.
ENOUGH_WARPS = 128
AIMED_WARPS = 512
MIN_SEGMENT = 256
MAX_SEGMENTS = 64


def linear_scan(
    x: Tensor, log_decay: Tensor, layout: Layout | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last state [B, D]; arguments as in `ops.linear_scan`."""
    dtype = _checked_dtype(x, log_decay)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    return forward(x, log_decay, initial_state, None if layout is None else layout.derive(_reset_bits))


def linear_scan_summary(x: Tensor, log_decay: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
    """The product of all decays and the last state from zero, each [B, D]; arguments as in `ops.linear_scan`."""
    _checked_dtype(x, log_decay)
    return summary(x, log_decay, None if layout is None else layout.derive(_reset_bits))


@torch.library.custom_op("rondo::linear_scan_triton_forward", mutates_args=())
def forward(x: Tensor, log_decay: Tensor, initial_state: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, T, D] in x's dtype and the last state [B, D] in that of the accumulation.

    x, log_decay: [B, T, D]; initial_state: [B, D] in the dtype of the accumulation; resets: `_reset_bits`.
    """
    x, log_decay = x.contiguous(), log_decay.contiguous()
    batch, time, width = x.shape
    count, length = _segments(batch, time, width)
    total, end = _summaries(x, log_decay, resets, count, length, reverse=False)
    y, state = torch.empty_like(x), x.new_empty(batch, width, dtype=accumulation_dtype(x, log_decay))
    initial = None if initial_state is None else initial_state.contiguous()
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(batch, width, count)](
            x, log_decay, resets, initial, total, end, y, state,
            T=time, S=count, L=length, D=width, EVEN=width % BD == 0, DTYPE=TYPES[state.dtype], BT=BT, BD=BD,
            num_warps=1,
        )  # fmt: skip
    return y, state


@torch.library.custom_op("rondo::linear_scan_triton_backward", mutates_args=())
def backward(
    dy: Tensor,
    dstate: Tensor,
    log_decay: Tensor,
    y: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dlog_decay [B, T, D] in the dtypes of y and log_decay, and dinitial_state [B, D] in that of dstate."""
    dy, log_decay = dy.contiguous(), log_decay.contiguous()
    batch, time, width = y.shape
    count, length = _segments(batch, time, width)
    total, end = _summaries(dy, log_decay, resets, count, length, reverse=True)
    dx, dlog_decay, dinitial = torch.empty_like(y), torch.empty_like(log_decay), dstate.new_empty(batch, width)
    initial = None if initial_state is None else initial_state.contiguous()
    with torch.cuda.device_of(y):
        _backward_kernel[_grid(batch, width, count)](
            dy, dstate.contiguous(), log_decay, y, resets, initial, total, end, dx, dlog_decay, dinitial,
            T=time, S=count, L=length, D=width, EVEN=width % BD == 0, DTYPE=TYPES[dstate.dtype], BT=BT, BD=BD,
            num_warps=1,
        )  # fmt: skip
    return dx, dlog_decay, dinitial


@torch.library.custom_op("rondo::linear_scan_triton_summary", mutates_args=())
def summary(x: Tensor, log_decay: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product of all decays, 0 where a document starts, and the last state from zero, each [B, D]."""
    x, log_decay = x.contiguous(), log_decay.contiguous()
    batch, time, width = x.shape
    count, length = _segments(batch, time, width)
    totals, ends = _summaries(x, log_decay, resets, count, length, reverse=False, always=True)
    total, state = totals[:, 0].clone(), ends[:, 0].clone()
    for s in range(1, count):
        state = torch.addcmul(ends[:, s], totals[:, s], state)
        total = totals[:, s] * total
    return total, state


@forward.register_fake
def _(x: Tensor, log_decay: Tensor, initial_state: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    state = x.new_empty(x.shape[0], x.shape[2], dtype=accumulation_dtype(x, log_decay))
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


@backward.register_fake
def _(
    dy: Tensor, dstate: Tensor, log_decay: Tensor, y: Tensor, initial_state: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dlog_decay = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    return torch.empty_like(y), dlog_decay, dstate.new_empty(dstate.shape)


@summary.register_fake
def _(x: Tensor, log_decay: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    total = x.new_empty(x.shape[0], x.shape[2], dtype=accumulation_dtype(x, log_decay))
    return total, torch.empty_like(total)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, log_decay, initial_state, resets = inputs
    ctx.save_for_backward(log_decay, output[0], initial_state, resets)


def _differentiate(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    log_decay, y, initial_state, resets = ctx.saved_tensors
    dx, dlog_decay, dinitial = backward(dy, dstate, log_decay, y, initial_state, resets)
    return dx, dlog_decay, None if initial_state is None else dinitial, None


def _save_summary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _differentiate_summary(ctx: Any, dtotal: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, None]:
    x, log_decay, resets, total = ctx.saved_tensors
    y, _ = forward(x, log_decay, None, resets)
    dx, dlog_decay, _ = backward(torch.zeros_like(y), dstate, log_decay, y, None, resets)
    return dx, (dlog_decay + (dtotal * total)[:, None]).to(log_decay.dtype), None


forward.register_autograd(_differentiate, setup_context=_save)
summary.register_autograd(_differentiate_summary, setup_context=_save_summary)


def _checked_dtype(x: Tensor, log_decay: Tensor) -> torch.dtype:
    dtype = accumulation_dtype(x, log_decay)
    if dtype == torch.float64 and (x.is_cuda or x.dtype != log_decay.dtype):
        raise ValueError(
            f"linear_scan: x is {x.dtype} and log_decay {log_decay.dtype}; impl 'triton' must have fp32, bf16 or fp16 "
            f"(interpreted, also float64 for both): choose impl 'chunked' for float64"
        )
    return dtype


def _reset_bits(positions: Tensor) -> Tensor:
    """int32 [B, ceil(T / BT)]: bit u of word i is set where token i * BT + u starts a document."""
    starts = torch.nn.functional.pad(positions == 0, (0, -positions.shape[1] % BT))
    weights = 2 ** torch.arange(BT, device=positions.device, dtype=torch.int32)
    return (starts.unflatten(1, (-1, BT)) * weights).sum(-1, dtype=torch.int32)


def _segments(batch: int, time: int, width: int) -> tuple[int, int]:
    """How many segments a row is cut into, and the tokens of each: a multiple of BT, the last may have fewer."""
    warps = batch * triton.cdiv(width, BD)
    if warps >= ENOUGH_WARPS:
        return 1, time
    count = max(1, min(triton.next_power_of_2(triton.cdiv(AIMED_WARPS, warps)), MAX_SEGMENTS, time // MIN_SEGMENT))
    length = triton.cdiv(time, count * BT) * BT
    return triton.cdiv(time, length), length


def _grid(batch: int, width: int, segments: int) -> tuple[int]:
    """All programs on axis 0, the only axis of a grid that may be longer than 65535."""
    return (batch * segments * triton.cdiv(width, BD),)


def _summaries(
    x: Tensor, log_decay: Tensor, resets: Tensor | None, count: int, length: int, *, reverse: bool, always: bool = False
) -> tuple[Tensor, Tensor]:
    """Each segment's product of decays and last state from zero [B, S, D]; nobody reads them for a single segment."""
    batch, time, width = x.shape
    dtype = accumulation_dtype(x, log_decay)
    total, end = (x.new_empty(batch, count, width, dtype=dtype) for _ in range(2))
    if count > 1 or always:
        with torch.cuda.device_of(x):
            _summary_kernel[_grid(batch, width, count)](
                x, log_decay, resets, total, end,
                T=time, S=count, L=length, D=width, REVERSE=reverse, EVEN=width % BD == 0, DTYPE=TYPES[dtype],
                BT=BT, BD=BD, num_warps=1,
            )  # fmt: skip
    return total, end


@triton.jit
def _load_bits(p_resets, o_words, i_w, num_words, HAS_RESETS: tl.constexpr):
    """Word i_w of the segment's reset bits; of a word outside the segment the nearest, which nobody uses."""
    bits = 0
    if HAS_RESETS:
        bits = tl.load(p_resets + o_words + tl.minimum(tl.maximum(i_w, 0), num_words - 1))
    return bits


@triton.jit
def _place(T, S, L, D, BT: tl.constexpr, BD: tl.constexpr):
    """Of this program: row, segment, channels, tokens of the segment, the offset of its first and of its reset bits."""
    i_p = tl.program_id(0)
    num_blocks = tl.cdiv(D, BD)
    i_b = (i_p // num_blocks // S).to(tl.int64)
    i_s = (i_p // num_blocks) % S
    o_d = (i_p % num_blocks) * BD + tl.arange(0, BD)
    o_words = i_b * tl.cdiv(T, BT) + i_s * L // BT
    return i_b, i_s, o_d, tl.minimum(T - i_s * L, L), (i_b * T + i_s * L) * D, o_words


@triton.jit
def _forward_word(
    p_x, p_log_decay, p_y, m_d, bits, b_h, b_total, length, D,
    PARTIAL: tl.constexpr, EVEN: tl.constexpr, HAS_RESETS: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BT steps of h_t = decay_t h_{t-1} + x_t, written to p_y, or with p_y None only summed up with their decays.

    Without masks, where every token and channel exists, a copy is one instruction. A masked token leaves the state as
    it is: its log decay is 0, its x too. Functions are called only where they are needed: interpreted, a call costs as
    much as ten operations. Beside bf16 x the hardware's exponential of two is exact enough; it gives 0 below 1e-38.
    """
    FILL: tl.constexpr = None if EVEN and not PARTIAL else 0.0
    for u in tl.static_range(BT):
        m_t = None if EVEN and not PARTIAL else (m_d & (u < length))
        b_x = tl.load(p_x + u * D, mask=m_t, other=FILL).to(DTYPE)
        b_log_decay = tl.load(p_log_decay + u * D, mask=m_t, other=FILL).to(DTYPE)
        if tl.float64 == DTYPE:
            b_decay = tl.exp(b_log_decay)
        elif p_x.dtype.element_ty == tl.float32:
            b_decay = exact_exp(b_log_decay)
        else:
            b_decay = tl.exp2(b_log_decay * LOG2_E)
        if HAS_RESETS:
            b_decay = tl.where(((bits >> u) & 1) != 0, 0.0, b_decay)
        b_h = b_decay * b_h + b_x
        if p_y is None:
            b_total *= b_decay
        else:
            if p_y.dtype.element_ty == tl.bfloat16:
                tl.store(p_y + u * D, rounded(b_h, tl.bfloat16), mask=m_t)
            else:
                tl.store(p_y + u * D, b_h, mask=m_t)
    return b_h, b_total


@triton.jit
def _walk_forward(
    p_x, p_log_decay, p_y, p_resets, o_words, m_d, b_h, b_total, length, D,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A segment of `length` tokens whose first lies at the pointers: full words, loaded ahead, then a partial one."""
    HAS_RESETS: tl.constexpr = p_resets is not None
    num_full = length // BT
    num_words = tl.cdiv(length, BT)
    bits = _load_bits(p_resets, o_words, 0, num_words, HAS_RESETS)
    for i_w in tl.range(0, num_full, num_stages=STAGES):
        bits_ahead = _load_bits(p_resets, o_words, i_w + 1, num_words, HAS_RESETS)
        b_h, b_total = _forward_word(
            p_x, p_log_decay, p_y, m_d, bits, b_h, b_total, BT, D, False, EVEN, HAS_RESETS, DTYPE, BT
        )
        bits = bits_ahead
        p_x += BT * D
        p_log_decay += BT * D
        if p_y is not None:
            p_y += BT * D
    if num_full < num_words:
        b_h, b_total = _forward_word(
            p_x, p_log_decay, p_y, m_d, bits, b_h, b_total, length % BT, D, True, EVEN, HAS_RESETS, DTYPE, BT
        )
    return b_h, b_total


@triton.jit
def _backward_word(
    p_dy, p_log_decay, p_y, p_dx, p_dlog_decay, m_d, bits, b_m, b_total, b_initial, is_first, length, D,
    PARTIAL: tl.constexpr, EVEN: tl.constexpr, HAS_RESETS: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BT steps against time: dx_t = dy_t + m_{t+1}, m_t = decay_t dx_t, dlog_decay_t = m_t h_{t-1}; with p_y None they
    are only summed up. `is_first` says that the word opens its row: before its first token lies the initial state."""
    FILL: tl.constexpr = None if EVEN and not PARTIAL else 0.0
    for k in tl.static_range(BT):
        u = BT - 1 - k
        m_t = None if EVEN and not PARTIAL else (m_d & (u < length))
        b_g = tl.load(p_dy + u * D, mask=m_t, other=FILL).to(DTYPE) + b_m
        b_log_decay = tl.load(p_log_decay + u * D, mask=m_t, other=FILL).to(DTYPE)
        if tl.float64 == DTYPE:
            b_decay = tl.exp(b_log_decay)
        elif p_dy.dtype.element_ty == tl.float32:
            b_decay = exact_exp(b_log_decay)
        else:
            b_decay = tl.exp2(b_log_decay * LOG2_E)
        if HAS_RESETS:
            b_decay = tl.where(((bits >> u) & 1) != 0, 0.0, b_decay)
        b_m = b_decay * b_g
        if p_y is None:
            b_total *= b_decay
        else:
            if k == BT - 1:
                b_before = tl.load(p_y + tl.where(is_first, 0, -D), mask=m_t, other=FILL).to(DTYPE)
                b_before = tl.where(is_first, b_initial, b_before)
            else:
                b_before = tl.load(p_y + (u - 1) * D, mask=m_t, other=FILL).to(DTYPE)
            b_dx = b_g
            b_dlog_decay = b_m * b_before
            if p_dx.dtype.element_ty == tl.bfloat16:
                b_dx = rounded(b_dx, tl.bfloat16)
            if p_dlog_decay.dtype.element_ty == tl.bfloat16:
                b_dlog_decay = rounded(b_dlog_decay, tl.bfloat16)
            tl.store(p_dx + u * D, b_dx, mask=m_t)
            tl.store(p_dlog_decay + u * D, b_dlog_decay, mask=m_t)
    return b_m, b_total


@triton.jit
def _walk_backward(
    p_dy, p_log_decay, p_y, p_dx, p_dlog_decay, p_resets, o_words, m_d, b_m, b_total, b_initial, opens_row, length, D,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A segment of `length` tokens whose first lies at the pointers, from its last word to its first."""
    HAS_RESETS: tl.constexpr = p_resets is not None
    num_full = length // BT
    num_words = tl.cdiv(length, BT)
    o_partial = (num_full * BT).to(tl.int64) * D
    p_dy += o_partial
    p_log_decay += o_partial
    if p_y is not None:
        p_y += o_partial
        p_dx += o_partial
        p_dlog_decay += o_partial
    bits = _load_bits(p_resets, o_words, num_words - 1, num_words, HAS_RESETS)
    if num_full < num_words:
        b_m, b_total = _backward_word(
            p_dy, p_log_decay, p_y, p_dx, p_dlog_decay, m_d, bits, b_m, b_total, b_initial,
            opens_row & (num_full == 0), length % BT, D, True, EVEN, HAS_RESETS, DTYPE, BT,
        )  # fmt: skip
        bits = _load_bits(p_resets, o_words, num_full - 1, num_words, HAS_RESETS)
    for i in tl.range(0, num_full, num_stages=STAGES):
        i_w = num_full - 1 - i
        bits_ahead = _load_bits(p_resets, o_words, i_w - 1, num_words, HAS_RESETS)
        p_dy -= BT * D
        p_log_decay -= BT * D
        if p_y is not None:
            p_y -= BT * D
            p_dx -= BT * D
            p_dlog_decay -= BT * D
        b_m, b_total = _backward_word(
            p_dy, p_log_decay, p_y, p_dx, p_dlog_decay, m_d, bits, b_m, b_total, b_initial, opens_row & (i_w == 0),
            BT, D, False, EVEN, HAS_RESETS, DTYPE, BT,
        )  # fmt: skip
        bits = bits_ahead
    return b_m, b_total


@triton.jit(do_not_specialize=["T", "S", "L"])
def _summary_kernel(
    p_x, p_log_decay, p_resets, p_total, p_end, T, S, L, D,
    REVERSE: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Each segment's product of decays and, from zero, its last h, or with REVERSE its first m (`_backward_word`)."""
    i_b, i_s, o_d, length, o_first, o_words = _place(T, S, L, D, BT, BD)
    m_d = o_d < D
    o = o_first + o_d
    b_end = tl.zeros([BD], DTYPE)
    b_total = tl.full([BD], 1.0, DTYPE)
    if REVERSE:
        b_end, b_total = _walk_backward(
            p_x + o, p_log_decay + o, None, None, None, p_resets, o_words, m_d, b_end, b_total, b_end, False, length, D,
            EVEN, DTYPE, BT,
        )  # fmt: skip
    else:
        b_end, b_total = _walk_forward(
            p_x + o, p_log_decay + o, None, p_resets, o_words, m_d, b_end, b_total, length, D, EVEN, DTYPE, BT
        )
    o_s = (i_b * S + i_s) * D + o_d
    tl.store(p_total + o_s, b_total, mask=m_d)
    tl.store(p_end + o_s, b_end, mask=m_d)


@triton.jit(do_not_specialize=["T", "S", "L"])
def _forward_kernel(
    p_x, p_log_decay, p_resets, p_initial, p_total, p_end, p_y, p_state, T, S, L, D,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_s, o_d, length, o_first, o_words = _place(T, S, L, D, BT, BD)
    m_d = o_d < D
    o = o_first + o_d
    b_h = tl.zeros([BD], DTYPE)
    if p_initial is not None:
        b_h += tl.load(p_initial + i_b * D + o_d, mask=m_d, other=0.0)
    for s in tl.range(0, i_s):
        o_s = (i_b * S + s) * D + o_d
        b_total = tl.load(p_total + o_s, mask=m_d, other=0.0)
        b_h = b_total * b_h + tl.load(p_end + o_s, mask=m_d, other=0.0)
    b_h, _ = _walk_forward(
        p_x + o, p_log_decay + o, p_y + o, p_resets, o_words, m_d, b_h, b_h, length, D, EVEN, DTYPE, BT
    )
    if i_s == S - 1:
        tl.store(p_state + i_b * D + o_d, b_h, mask=m_d)


@triton.jit(do_not_specialize=["T", "S", "L"])
def _backward_kernel(
    p_dy, p_dstate, p_log_decay, p_y, p_resets, p_initial, p_total, p_end, p_dx, p_dlog_decay, p_dinitial, T, S, L, D,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_s, o_d, length, o_first, o_words = _place(T, S, L, D, BT, BD)
    m_d = o_d < D
    o = o_first + o_d
    b_m = tl.load(p_dstate + i_b * D + o_d, mask=m_d, other=0.0)
    for i in tl.range(0, S - 1 - i_s):
        o_s = (i_b * S + S - 1 - i) * D + o_d
        b_total = tl.load(p_total + o_s, mask=m_d, other=0.0)
        b_m = b_total * b_m + tl.load(p_end + o_s, mask=m_d, other=0.0)
    b_initial = tl.zeros([BD], DTYPE)
    if p_initial is not None:
        b_initial += tl.load(p_initial + i_b * D + o_d, mask=m_d, other=0.0)
    b_m, _ = _walk_backward(
        p_dy + o, p_log_decay + o, p_y + o, p_dx + o, p_dlog_decay + o, p_resets, o_words, m_d, b_m, b_m, b_initial,
        i_s == 0, length, D, EVEN, DTYPE, BT,
    )  # fmt: skip
    if i_s == 0:
        tl.store(p_dinitial + i_b * D + o_d, b_m, mask=m_d)
