"""gated_delta_rule in Triton kernels: the chunk form of `ops/gated_delta_rule/chunked.py`, its inverses and outputs for
all chunks side by side, its states one chunk after the other.

Products take operands of v's dtype and sum in fp32 (all float64 beside float64 inputs, interpreted only). Wider q and k
are rounded once, before the kernels, which load them six times; their gradients come back through the same rounding.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ops.gated_delta_rule import triton_backward, triton_forward
from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.rounding import TYPES

MAX_KEY_DIM = 256


class Sizes(NamedTuple):
    """Of the kernels' tiles, a function of dtype and head dims alone."""

    chunk: int
    """Tokens a chunk: 64 feed the tensor cores; fp32, which is summed without them, is most precise with few."""
    keys: int
    """All key features, in the kernels that hold a state, rounded up to a power of two."""
    key_block: int
    state_values: int
    """Value features a program of those kernels: a tile of 128 x 64 fp32 is 64 registers a thread."""
    value_block: int


def tile_sizes(key_dim: int, value_dim: int, dtype: torch.dtype) -> Sizes:
    narrow = dtype.itemsize == 2
    chunk = 64 if narrow else 16
    keys, values = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    state_values = (64 if keys <= 128 else 32) if narrow else (32 if keys <= 128 else 16)
    return Sizes(
        chunk=chunk,
        keys=keys,
        key_block=min(keys, chunk),
        state_values=min(values, state_values),
        value_block=min(values, 128 if narrow else 32),
    )


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] and the last state [B, HV, K, V]; arguments as in `ops.gated_delta_rule`."""
    if q.shape[3] > MAX_KEY_DIM:
        raise ValueError(
            f"gated_delta_rule: q has K = {q.shape[3]} features; 'triton' takes at most {MAX_KEY_DIM}: choose 'chunked'"
        )
    if q.is_cuda and accumulation_dtype(q, k, v, log_decay, beta) == torch.float64:
        raise ValueError("gated_delta_rule: float64 inputs; 'triton' computes in fp32 on a GPU: choose 'chunked'")
    positions = None if layout is None else layout.positions.contiguous()
    narrow = operand_dtype(q, k, v, log_decay, beta)
    inputs = (z.contiguous() for z in (q.to(narrow), k.to(narrow), v, log_decay, beta))
    o, state, *_ = forward(*inputs, None if initial_state is None else initial_state.contiguous(), positions, scale)
    return o, state


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """What products round their operands to, of q, k, v, log_decay and beta."""
    return torch.float64 if accumulation_dtype(*tensors) == torch.float64 else tensors[2].dtype


Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("rondo::gated_delta_rule_triton_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    positions: Tensor | None,
    scale: float,
) -> Forward:
    """o and the last state; then what the backward needs: X, the decays into and out of each chunk, the scores, what is
    written, and the state before each chunk. All arguments are contiguous."""
    (batch, time, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    results = _forward_results(q, k, v, log_decay, beta)
    o, state, x, carry, scores, writes, states = results
    sizes, options = _launch(q, k, v, log_decay, beta)
    chunks = batch * value_heads * triton.cdiv(time, sizes.chunk)
    dims = {"T": time, "H": heads, "HV": value_heads, "K": key_dim, "BT": sizes.chunk, **options}
    masked = {"HAS_POSITIONS": positions is not None}
    precision = "tf32" if o.dtype.itemsize == 2 else "ieee"
    triton_forward.solve_kernel[(chunks,)](
        k, log_decay, beta, positions, x, carry, BK=sizes.key_block, PRECISION=precision, **masked, **dims
    )
    blocks = triton.cdiv(value_dim, sizes.state_values)
    triton_forward.states_kernel[(batch * value_heads * blocks,)](
        k, v, beta, x, carry, initial_state, writes, states, state,
        V=value_dim, BK=sizes.keys, BV=sizes.state_values, HAS_INITIAL_STATE=initial_state is not None, **dims,
    )  # fmt: skip
    blocks = triton.cdiv(value_dim, sizes.value_block)
    triton_forward.outputs_kernel[(chunks * blocks,)](
        q, k, log_decay, positions, carry, writes, states, scores, o,
        SCALE=scale, V=value_dim, BK=sizes.key_block, BV=sizes.value_block, **masked, **dims,
    )  # fmt: skip
    return results


@torch.library.custom_op("rondo::gated_delta_rule_triton_backward", mutates_args=())
def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    positions: Tensor | None,
    scale: float,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta and the initial state, of those of o and the last state; `saved` is what
    `forward` returned after these two. All arguments are contiguous."""
    x, carry, scores, writes, states = saved
    (batch, time, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    sizes, options = _launch(q, k, v, log_decay, beta)
    dresidual, dstates, dscores, dlower = (torch.empty_like(z) for z in (writes, states, scores, scores))
    dq, dk, dv, dlog_decay, dbeta = (torch.empty_like(z) for z in (q, k, v, log_decay, beta))
    dinitial_state = carry.new_empty(batch, value_heads, key_dim, value_dim)
    ways, dbeta_pairs = (torch.empty_like(carry[..., 0, :]) for _ in range(2))
    key_blocks = triton.cdiv(key_dim, sizes.key_block)
    sums = carry.new_empty(*carry.shape[:3], key_blocks, 4, sizes.chunk)
    key_chunks = batch * heads * carry.shape[2]
    chunks = batch * value_heads * carry.shape[2]
    dims = {"T": time, "H": heads, "HV": value_heads, "K": key_dim, "V": value_dim, "BT": sizes.chunk, **options}
    triton_backward.adjoint_kernel[(batch * value_heads * triton.cdiv(value_dim, sizes.state_values),)](
        do, dstate, q, k, beta, x, carry, scores, dresidual, dv, dstates, dinitial_state,
        SCALE=scale, BK=sizes.keys, BV=sizes.state_values, HAS_DSTATE=dstate is not None, **dims | {"num_stages": 1},
    )  # fmt: skip
    dims |= {"BK": sizes.key_block, "BV": min(sizes.value_block, 64)}
    triton_backward.pairs_kernel[(chunks,)](
        do, k, v, log_decay, beta, positions, scores, writes, dresidual, dscores, dlower, ways, dbeta_pairs,
        SCALE=scale, HAS_POSITIONS=positions is not None, **dims,
    )  # fmt: skip
    triton_backward.keys_kernel[(key_chunks * key_blocks,)](
        do, q, k, beta, carry, writes, states, dresidual, dstates, dscores, dlower, dq, dk, sums, SCALE=scale, **dims
    )
    triton_backward.decays_kernel[(chunks,)](
        beta, carry, ways, dbeta_pairs, sums, dlog_decay, dbeta,
        T=time, HV=value_heads, NK=key_blocks, BT=sizes.chunk, BK=sizes.key_block, ACC=dims["ACC"], num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, dlog_decay, dbeta, dinitial_state


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    positions: Tensor | None,
    scale: float,
) -> Forward:
    return _forward_results(q, k, v, log_decay, beta)


@backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    positions: Tensor | None,
    scale: float,
    saved: list[Tensor],
) -> tuple[Tensor, ...]:
    shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return *(torch.empty_like(z) for z in (q, k, v, log_decay, beta)), saved[1].new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    *tensors, initial_state, positions, ctx.scale = inputs
    ctx.has_initial_state = initial_state is not None
    ctx.set_materialize_grads(False)  # or each output that the backward needs would get a gradient of zeros
    ctx.save_for_backward(*tensors, positions, *output[2:])


def _backward(ctx: Any, do: Tensor | None, dstate: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, beta, positions, *saved = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    *gradients, dinitial_state = backward(do, dstate, q, k, v, log_decay, beta, positions, ctx.scale, saved)
    return *gradients, dinitial_state if ctx.has_initial_state else None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)


def _forward_results(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Forward:
    """What `forward` returns, unfilled."""
    (batch, time, _, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    dtype = accumulation_dtype(q, k, v, log_decay, beta)
    narrow = operand_dtype(q, k, v, log_decay, beta)
    size = tile_sizes(key_dim, value_dim, narrow).chunk
    chunks = (batch, value_heads, (time + size - 1) // size)
    square = v.new_empty(*chunks, size, size, dtype=narrow)
    return (
        torch.empty_like(v),
        v.new_empty(batch, value_heads, key_dim, value_dim, dtype=dtype),
        square,
        v.new_empty(*chunks, 2, size, dtype=dtype),
        torch.empty_like(square),
        torch.empty_like(v, dtype=narrow),
        v.new_empty(*chunks, key_dim, value_dim, dtype=narrow),
    )


def _launch(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> tuple[Sizes, dict[str, Any]]:
    narrow = operand_dtype(q, k, v, log_decay, beta)
    options = {
        "DTYPE": TYPES[narrow],
        "ACC": TYPES[accumulation_dtype(q, k, v, log_decay, beta)],
        "num_warps": 4,
        "num_stages": 2,
    }
    return tile_sizes(q.shape[3], v.shape[3], narrow), options
