"""rotary as one kernel, which reads x once and writes the result once; backwards it turns by the opposite angle.

A program has a few tokens: it forms their angles once and goes through the heads.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.rounding import INTERPRETED, rounded

# Pairs of features that a program turns at a time: 8 a thread, so that both features are loaded in 16 bytes of bf16.
TILE = 1024
TURN = tl.constexpr(2 * math.pi)


def rotary(x: Tensor, positions: Tensor, theta: float, rotary_dim: int) -> Tensor:
    """[B, T, H, K]; arguments as in `ops.rotary`. Raises ValueError for float64 on a GPU."""
    if x.dtype == torch.float64 and not INTERPRETED.value:
        raise ValueError(
            "rotary: x has dtype torch.float64; the implementation 'triton' takes fp32, bf16 and fp16 on a GPU: use "
            "'reference'"
        )
    return rotate(x, positions, theta, rotary_dim, False)


@torch.library.custom_op("rondo::rotary_triton", mutates_args=())
def rotate(x: Tensor, positions: Tensor, theta: float, rotary_dim: int, inverse: bool) -> Tensor:
    """x [B, T, H, K] turned by the angles of its positions, or back; contiguous."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, time, heads, features = x.shape
    block_k = triton.next_power_of_2(rotary_dim // 2)
    block_m = max(1, TILE // block_k)
    _rotate[(triton.cdiv(batch * time, block_m),)](
        x,
        positions.contiguous(),
        y,
        batch * time,
        time,
        heads,
        theta,
        *x.stride()[:3],
        K=features,
        HALF=rotary_dim // 2,
        INVERSE=inverse,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        BM=block_m,
        BK=block_k,
        BR=triton.next_power_of_2(max(1, features - rotary_dim)),
        num_warps=4,
    )
    return y


@rotate.register_fake
def _(x: Tensor, positions: Tensor, theta: float, rotary_dim: int, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, positions, ctx.theta, ctx.rotary_dim, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return rotate(dy, *ctx.saved_tensors, ctx.theta, ctx.rotary_dim, not ctx.inverse), None, None, None, None


rotate.register_autograd(_backward, setup_context=_setup_context)


@triton.jit(do_not_specialize=["M", "T"])
def _rotate(
    p_x,
    p_positions,
    p_y,
    M,
    T,
    H,
    theta,
    stride_b,
    stride_t,
    stride_h,
    K: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_m = (o_m < M)[:, None]
    m = m_m & (o_k < HALF)[None, :]
    # In float64 down to half a turn: rounded to fp32, the angle of token 100,000 would be off by 4e-3.
    b_turns = tl.exp2(-tl.log2(tl.zeros([BK], tl.float64) + theta) * o_k / HALF) * (1 / TURN)  # of one position
    b_turns = tl.load(p_positions + o_m, mask=o_m < M, other=0).to(tl.float64)[:, None] * b_turns[None, :]
    b_angle = ((b_turns - tl.floor(b_turns + 0.5)) * TURN).to(ACC)
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)
    if INVERSE:
        b_sin = -b_sin
    p_in = p_x + (o_m // T * stride_b + o_m % T * stride_t)[:, None]
    p_out = p_y + o_m[:, None] * H * K
    for _ in range(H):
        b_first = tl.load(p_in + o_k[None, :], mask=m, other=0.0).to(ACC)
        b_second = tl.load(p_in + HALF + o_k[None, :], mask=m, other=0.0).to(ACC)
        b_turned = rounded(b_first * b_cos - b_second * b_sin, p_y.dtype.element_ty)
        tl.store(p_out + o_k[None, :], b_turned, mask=m)
        b_turned = rounded(b_second * b_cos + b_first * b_sin, p_y.dtype.element_ty)
        tl.store(p_out + HALF + o_k[None, :], b_turned, mask=m)
        if K > 2 * HALF:
            o_r = 2 * HALF + tl.arange(0, BR)[None, :]
            m_r = m_m & (o_r < K)
            tl.store(p_out + o_r, tl.load(p_in + o_r, mask=m_r), mask=m_r)
        p_in += stride_h
        p_out += K
