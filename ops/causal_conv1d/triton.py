"""causal_conv1d as two kernels: each reads its inputs from memory once and writes its result once.

Forward: a program has a tile of tokens and channels, and reads it W times, shifted by one token each; W - 1 of them hit
the cache.

Backward: with silu the gradient of a token needs the sums of its W - 1 successors, which need as many inputs. So a
program walks through time with both windows in registers. It has BR segments side by side; of its STEPS steps in a
segment the last W - 1 only complete the gradients of the segment's last inputs. The contributions to the gradient of
weight and bias are summed in registers, written one row a program, and added up over the programs in a fixed order.
"""

# ruff: noqa: RUF005, SIM102  (a compiled kernel joins tuples by +, which so grow, and drops what `if` shuts out)
# mypy: disable-error-code="assignment,var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import dtype as triton_dtype

from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.rounding import INTERPRETED, rounded

MAX_WINDOW = 8
# Tokens and channels of a forward tile: a row is one cache line of bf16, and a thread has 32 sums.
FORWARD_BLOCK = (64, 64)
# Segments and channels of a backward program, and steps of a segment. A thread has 4 channels of one segment, whose
# windows, weights and sums take 4 W registers each.
BACKWARD_BLOCK = (8, 64)
STEPS = 32
# Steps whose inputs are loaded together, so that enough bytes are under way: 32 B a thread and tensor.
UNROLL = 4


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layout: Layout | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last W-1 inputs [B, W-1, D]; arguments as in `ops.causal_conv1d`.

    Raises ValueError for W > 8, and for float64 on a GPU.
    """
    if weight.shape[1] > MAX_WINDOW:
        raise ValueError(
            f"causal_conv1d: weight has W = {weight.shape[1]} taps; the implementation 'triton' takes at most "
            f"{MAX_WINDOW}: use 'chunked'"
        )
    if accumulation_dtype(x) == torch.float64 and not INTERPRETED.value:
        raise ValueError(
            "causal_conv1d: x has dtype torch.float64; the implementation 'triton' takes fp32, bf16 and fp16 on a GPU: "
            "use 'chunked'"
        )
    positions = None if layout is None else layout.positions
    return forward(x, weight, bias, positions, initial_state, activation == "silu")


@torch.library.custom_op("rondo::causal_conv1d_triton_forward", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last inputs [B, W-1, D]; positions int64 [B, T] or None."""
    x, (batch, time, width) = _rows_contiguous(x), x.shape
    window = weight.shape[1]
    y, state = _forward_outputs(x, weight)
    block_t, block_d = FORWARD_BLOCK
    _forward[(batch * triton.cdiv(time, block_t) * triton.cdiv(width, block_d),)](
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if positions is None else positions.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        y,
        state,
        time,
        width,
        x.stride(0),
        x.stride(1),
        W=window,
        SILU=silu,
        ACC=_accumulation(x),
        BT=block_t,
        BD=block_d,
        num_warps=4,
    )
    return y, state


@torch.library.custom_op("rondo::causal_conv1d_triton_backward", mutates_args=())
def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    dy: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial_state; without bias or initial_state theirs has no elements."""
    x, dy, (batch, time, width) = _rows_contiguous(x), _rows_contiguous(dy), x.shape
    window = weight.shape[1]
    dx, _, _, dinitial_state = _backward_outputs(x, weight, bias, initial_state)
    block_r, block_d = BACKWARD_BLOCK
    blocks = batch * triton.cdiv(time, block_r * (STEPS - window + 1))
    sums = x.new_empty(blocks, window + (bias is not None), width, dtype=accumulation_dtype(x))
    _backward[(blocks * triton.cdiv(width, block_d),)](
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if positions is None else positions.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        dy,
        None if dstate is None else dstate.contiguous(),
        dx,
        None if initial_state is None else dinitial_state,
        sums,
        time,
        width,
        x.stride(0),
        x.stride(1),
        dy.stride(0),
        dy.stride(1),
        W=window,
        SILU=silu,
        ACC=_accumulation(x),
        STEPS=STEPS,
        UNROLL=UNROLL,
        BR=block_r,
        BD=block_d,
        num_warps=4,
    )
    total = sums.sum(0)
    dweight = total[:window].T.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    dbias = x.new_empty(0) if bias is None else total[window].to(bias.dtype, copy=True)
    return dx, dweight, dbias, dinitial_state


@forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return _forward_outputs(x, weight)


@backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    dy: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_outputs(x, weight, bias, initial_state)


def _forward_outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, width = x.shape
    state = x.new_empty(batch, weight.shape[1] - 1, width, dtype=accumulation_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


def _backward_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, weight, x.new_empty(0) if bias is None else bias)
    dx, dweight, dbias = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs)
    state = x.new_empty(0) if initial_state is None else initial_state
    return dx, dweight, dbias, torch.empty_like(state, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_formula(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, positions, initial_state = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dinitial_state = backward(x, weight, bias, positions, initial_state, ctx.silu, dy, dstate)
    absent = (None if bias is None else dbias, None, None if initial_state is None else dinitial_state, None)
    return dx, dweight, *absent


forward.register_autograd(_backward_formula, setup_context=_setup_context)


def _rows_contiguous(x: Tensor) -> Tensor:
    """x [B, T, D] with the channels of a token side by side; slices of a wider projection stay where they are."""
    return x if x.stride(2) == 1 else x.contiguous()


def _accumulation(x: Tensor) -> triton_dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit
def _load_input(p_x, p_initial, o_t, o_d, T, D, stride_t, W: tl.constexpr, ACC: tl.constexpr):
    """Inputs at times o_t [BT] of a row: x from 0 on, the initial state before it, 0 outside both. -> [BT, BD]"""
    m_d = (o_d < D)[None, :]
    m_x = ((o_t >= 0) & (o_t < T))[:, None] & m_d
    b_x = tl.load(p_x + o_t.to(tl.int64)[:, None] * stride_t + o_d[None, :], mask=m_x, other=0.0).to(ACC)
    if p_initial is not None:
        m_initial = ((o_t < 0) & (o_t >= 1 - W))[:, None] & m_d
        b_x += tl.load(p_initial + (o_t + W - 1)[:, None] * D + o_d[None, :], mask=m_initial, other=0.0).to(ACC)
    return b_x


@triton.jit(do_not_specialize=["T"])
def _forward(
    p_x,
    p_weight,
    p_bias,
    p_positions,
    p_initial,
    p_y,
    p_state,
    T,
    D,
    stride_b,
    stride_t,
    W: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    num_t, num_d = tl.cdiv(T, BT), tl.cdiv(D, BD)
    i_d, i_t = tl.program_id(0) % num_d, tl.program_id(0) // num_d % num_t
    i_b = (tl.program_id(0) // num_d // num_t).to(tl.int64)
    o_d, o_t = i_d * BD + tl.arange(0, BD), i_t * BT + tl.arange(0, BT)
    m_d, m_t = o_d < D, o_t < T
    p_x += i_b * stride_b
    if p_initial is not None:
        p_initial += i_b * (W - 1) * D
    if p_positions is not None:
        p_positions += i_b * T
        b_position = tl.load(p_positions + o_t, mask=m_t, other=0)
    b_y = tl.zeros([BT, BD], ACC)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    for j in tl.static_range(W):
        b_tap = _load_input(p_x, p_initial, o_t - j, o_d, T, D, stride_t, W, ACC)
        if p_positions is not None:
            b_tap = tl.where((b_position >= j)[:, None], b_tap, 0.0)
        b_y += b_tap * tl.load(p_weight + o_d * W + (W - 1 - j), mask=m_d, other=0.0).to(ACC)[None, :]
    if SILU:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    p_out = p_y + (i_b * T + o_t.to(tl.int64)[:, None]) * D + o_d[None, :]
    tl.store(p_out, rounded(b_y, p_y.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])

    if i_t == num_t - 1:
        o_i = tl.arange(0, 8)  # the slots of the state
        b_state = _load_input(p_x, p_initial, T - W + 1 + o_i, o_d, T, D, stride_t, W, ACC)
        if p_positions is not None:
            m_same = W - 2 - o_i <= tl.load(p_positions + T - 1)
            b_state = tl.where(m_same[:, None], b_state, 0.0)
        p_slots = p_state + (i_b * (W - 1) + o_i[:, None]) * D + o_d[None, :]
        tl.store(p_slots, b_state, mask=(o_i < W - 1)[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["T"])
def _backward(
    p_x,
    p_weight,
    p_bias,
    p_positions,
    p_initial,
    p_dy,
    p_dstate,
    p_dx,
    p_dinitial,
    p_sums,
    T,
    D,
    stride_b,
    stride_t,
    dy_stride_b,
    dy_stride_t,
    W: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    L: tl.constexpr = STEPS - W + 1  # tokens of a segment
    num_t, num_d = tl.cdiv(T, BR * L), tl.cdiv(D, BD)
    i_d, i_row = tl.program_id(0) % num_d, tl.program_id(0) // num_d
    i_b, i_t = (i_row // num_t).to(tl.int64), i_row % num_t
    o_d = i_d * BD + tl.arange(0, BD)
    o_start = (i_t * BR + tl.arange(0, BR)) * L  # the first token of each segment
    m_d = o_d < D
    p_x += i_b * stride_b
    p_dy += i_b * dy_stride_b + o_d[None, :]
    p_dx += i_b * T * D + o_d[None, :]
    if p_initial is not None:
        p_initial += i_b * (W - 1) * D
    if p_positions is not None:
        p_positions += i_b * T

    b_bias = tl.zeros([BD], ACC)
    if p_bias is not None:
        b_bias += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(ACC)
    weights = ()  # of tap j
    dweights = ()
    inputs = ()  # x_{t-1}, x_{t-2}, ...
    pending = ()  # what dx_{t-1}, dx_{t-2}, ... have got so far
    for j in tl.static_range(W):
        weights = weights + (tl.load(p_weight + o_d * W + (W - 1 - j), mask=m_d, other=0.0).to(ACC)[None, :],)
        dweights = dweights + (tl.zeros([BR, BD], ACC),)
    for j in tl.static_range(1, W):
        inputs = inputs + (_load_input(p_x, p_initial, o_start - j, o_d, T, D, stride_t, W, ACC),)
        pending = pending + (tl.zeros([BR, BD], ACC),)
    b_dbias = tl.zeros([BR, BD], ACC)

    for i_step in range(0, STEPS, UNROLL):
        loaded = ()
        for i in tl.static_range(UNROLL):
            o_t = o_start + i_step + i
            m = (o_t < T)[:, None] & m_d[None, :]
            o_row = o_t.to(tl.int64)[:, None]
            b_x = tl.load(p_x + o_row * stride_t + o_d[None, :], mask=m, other=0.0)
            loaded = loaded + ((b_x, tl.load(p_dy + o_row * dy_stride_t, mask=m, other=0.0)),)
        for i in tl.static_range(UNROLL):
            n = i_step + i
            o_t = o_start + n
            if p_positions is not None:
                b_position = tl.load(p_positions + o_t, mask=o_t < T, other=0)[:, None]
            b_x, b_g = loaded[i][0].to(ACC), loaded[i][1].to(ACC)
            taps = (b_x,)
            for j in tl.static_range(1, W):
                if p_positions is not None:
                    taps = taps + (tl.where(b_position >= j, inputs[j - 1], 0.0),)
                else:
                    taps = taps + (inputs[j - 1],)
            if SILU:
                b_z = b_bias[None, :] + weights[0] * b_x
                for j in tl.static_range(1, W):
                    b_z += weights[j] * taps[j]
                b_gate = 1.0 / (1.0 + tl.exp(-b_z))
                b_g *= b_gate * (1.0 + b_z * (1.0 - b_gate))

            b_own = tl.where(n < L, b_g, 0.0)  # later tokens are another segment's
            b_dbias += b_own
            sums, moved, seen = (), (), ()
            for j in tl.static_range(W):
                sums = sums + (dweights[j] + b_own * taps[j],)
                b_push = weights[j] * b_g
                if j > 0:
                    if p_positions is not None:
                        b_push = tl.where(b_position >= j, b_push, 0.0)
                    b_push += pending[j - 1]
                if j < W - 1:
                    moved = moved + (b_push,)
                    if j > 0:
                        seen = seen + (inputs[j - 1],)
                else:
                    b_dx = b_push
            if W > 1:
                inputs = (b_x,) + seen
            dweights, pending = sums, moved

            o_s = o_t - W + 1  # the input whose gradient is complete
            m_s = (o_s < T)[:, None] & m_d[None, :]
            if p_dstate is not None and W > 1:
                o_slot = o_s - T + W - 1
                m_same = (o_slot >= 0)[:, None] & m_s
                if p_positions is not None:
                    m_same = m_same & (T - 1 - o_s <= tl.load(p_positions + T - 1))[:, None]
                p_slot = p_dstate + (i_b * (W - 1) + o_slot)[:, None] * D + o_d[None, :]
                b_dx += tl.load(p_slot, mask=m_same, other=0.0).to(ACC)
            p_out = p_dx + o_s.to(tl.int64)[:, None] * D
            tl.store(p_out, rounded(b_dx, p_dx.dtype.element_ty), mask=m_s & (n >= W - 1))
            if p_dinitial is not None and W > 1:
                if i_t == 0 and n < W - 1:
                    p_slot = p_dinitial + (i_b * (W - 1) + o_s + W - 1)[:, None] * D + o_d[None, :]
                    b_out = rounded(b_dx, p_dinitial.dtype.element_ty)
                    tl.store(p_slot, b_out, mask=m_d[None, :] & (o_s < 0)[:, None])

    p_sums += i_row.to(tl.int64) * (W + (p_bias is not None)) * D + o_d
    for j in tl.static_range(W):
        tl.store(p_sums + (W - 1 - j) * D, tl.sum(dweights[j], 0), mask=m_d)
    if p_bias is not None:
        tl.store(p_sums + W * D, tl.sum(b_dbias, 0), mask=m_d)
