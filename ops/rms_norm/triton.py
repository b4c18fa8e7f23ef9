"""rms_norm as two kernels: each reads its inputs from memory once and writes its results once.

A program has whole rows, many short ones or one long one, in registers. The backward forms the inverse root mean
square again, from the row that it needs anyway. It goes through a fixed number of rows, adds up their contributions to
the gradient of the weight in registers and writes them as one row; the rows of all programs are added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import dtype as triton_dtype

from ops.precision import accumulation_dtype
from ops.rounding import INTERPRETED, rounded

MAX_WIDTH = 16384
# Elements of a tile: 16 a thread, so that x, its gradients, the gate and the weight stay in registers.
TILE = 2048
# Rows of a backward program, at least and in tiles: its one row of sums is 4 % of what it reads and writes, or less.
MIN_ROWS, MIN_TILES = 32, 8


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool, gate: Tensor | None) -> Tensor:
    """y [..., D]; arguments as in `ops.rms_norm`.

    Raises ValueError for D > 16384, and for float64 on a GPU.
    """
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"rms_norm: x has D = {x.shape[-1]}; the implementation 'triton' takes at most {MAX_WIDTH}: use 'chunked'"
        )
    if x.dtype == torch.float64 and not INTERPRETED.value:
        raise ValueError(
            "rms_norm: x has dtype torch.float64; the implementation 'triton' takes fp32, bf16 and fp16 on a GPU: use "
            "'chunked'"
        )
    return forward(x, weight, gate, eps, one_plus_weight)


@torch.library.custom_op("rondo::rms_norm_triton_forward", mutates_args=())
def forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, one_plus_weight: bool) -> Tensor:
    """y [..., D], contiguous."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, gate = _rows(x), None if gate is None else _rows(gate)
    rows, width = x.shape
    block_m, block_d, num_warps = _tile(width)
    if rows:
        _forward[(triton.cdiv(rows, block_m),)](
            x,
            weight.contiguous(),
            gate,
            y,
            rows,
            width,
            eps,
            x.stride(0),
            0 if gate is None else gate.stride(0),
            ONE_PLUS=one_plus_weight,
            ACC=_accumulation(x),
            BM=block_m,
            BD=block_d,
            num_warps=num_warps,
        )
    return y


@torch.library.custom_op("rondo::rms_norm_triton_backward", mutates_args=())
def backward(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, one_plus_weight: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and gate; without a gate its has no elements."""
    dx, _, dgate = _backward_outputs(x, weight, gate)
    x, dy, gate = _rows(x), _rows(dy), None if gate is None else _rows(gate)
    rows, width = x.shape
    block_m, block_d, num_warps = _tile(width)
    tiles = max(MIN_TILES, MIN_ROWS // block_m)
    blocks = triton.cdiv(rows, block_m * tiles)
    sums = x.new_empty(blocks, width, dtype=accumulation_dtype(x))
    if rows:
        _backward[(blocks,)](
            x,
            weight.contiguous(),
            gate,
            dy,
            dx,
            None if gate is None else dgate,
            sums,
            rows,
            width,
            eps,
            x.stride(0),
            0 if gate is None else gate.stride(0),
            dy.stride(0),
            ONE_PLUS=one_plus_weight,
            ACC=_accumulation(x),
            TILES=tiles,
            BM=block_m,
            BD=block_d,
            num_warps=num_warps,
        )
    return dx, sums.sum(0).to(weight.dtype), dgate


@forward.register_fake
def _(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, one_plus_weight: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@backward.register_fake
def _(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, one_plus_weight: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(x, weight, gate)


def _backward_outputs(x: Tensor, weight: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x, weight, x.new_empty(0) if gate is None else gate)
    dx, dweight, dgate = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in tensors)
    return dx, dweight, dgate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, gate, ctx.eps, ctx.one_plus_weight = inputs
    ctx.save_for_backward(x, weight, gate)


def _backward_formula(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate = ctx.saved_tensors
    dx, dweight, dgate = backward(x, weight, gate, ctx.eps, ctx.one_plus_weight, dy)
    return dx, dweight, None if gate is None else dgate, None, None


forward.register_autograd(_backward_formula, setup_context=_setup_context)


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as rows [M, D] with the features of a row side by side; evenly spaced rows stay where they are."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and features of a tile, and warps."""
    block_d = max(16, triton.next_power_of_2(width))
    return max(1, TILE // block_d), block_d, min(16, max(4, block_d // 512))


def _accumulation(x: Tensor) -> triton_dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit(do_not_specialize=["M"])
def _forward(
    p_x,
    p_weight,
    p_gate,
    p_y,
    M,
    D,
    eps,
    stride_x,
    stride_gate,
    ONE_PLUS: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m = (o_m < M)[:, None] & m_d[None, :]
    b_x = tl.load(p_x + o_m[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(ACC)
    b_factor = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(ACC) + ONE_PLUS
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None] * b_factor[None, :]
    if p_gate is not None:
        b_gate = tl.load(p_gate + o_m[:, None] * stride_gate + o_d[None, :], mask=m, other=0.0).to(ACC)
        b_y *= b_gate / (1.0 + tl.exp(-b_gate))
    tl.store(p_y + o_m[:, None] * D + o_d[None, :], rounded(b_y, p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["M"])
def _backward(
    p_x,
    p_weight,
    p_gate,
    p_dy,
    p_dx,
    p_dgate,
    p_sums,
    M,
    D,
    eps,
    stride_x,
    stride_gate,
    stride_dy,
    ONE_PLUS: tl.constexpr,
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    i_block = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_factor = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(ACC)[None, :] + ONE_PLUS
    b_sum = tl.zeros([BM, BD], ACC)
    for i_tile in range(TILES):
        o_m = (i_block * TILES + i_tile) * BM + tl.arange(0, BM)
        m = (o_m < M)[:, None] & m_d[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(ACC)
        b_dy = tl.load(p_dy + o_m[:, None] * stride_dy + o_d[None, :], mask=m, other=0.0).to(ACC)
        b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        b_normed = b_x * b_scale
        o_out = o_m[:, None] * D + o_d[None, :]
        if p_gate is not None:
            b_gate = tl.load(p_gate + o_m[:, None] * stride_gate + o_d[None, :], mask=m, other=0.0).to(ACC)
            b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
            b_dgate = b_dy * b_normed * b_factor * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
            tl.store(p_dgate + o_out, rounded(b_dgate, p_dgate.dtype.element_ty), mask=m)
            b_dy *= b_gate * b_sigmoid
        b_sum += b_dy * b_normed
        b_dnormed = b_dy * b_factor
        b_mean = (tl.sum(b_dnormed * b_normed, 1) / D)[:, None]
        b_dx = (b_dnormed - b_normed * b_mean) * b_scale
        tl.store(p_dx + o_out, rounded(b_dx, p_dx.dtype.element_ty), mask=m)
    if BM > 8:  # as a tree: the interpreter adds rows one after the other, which costs digits
        b_sum = tl.sum(tl.reshape(b_sum, [BM // 8, 8, BD]), 1)
    tl.store(p_sums + i_block * D + o_d, tl.sum(b_sum, 0), mask=m_d)
