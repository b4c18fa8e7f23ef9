"""gated_delta_rule chunk by chunk in its WY form, with a hand-written backward.

Inside a chunk of C tokens that starts from the state S, the recurrence is solved for what every token really writes
(arXiv 2406.06484, section 3.2; with decays arXiv 2412.06464, section 3.3):

    writes = X (beta v - beta carry_in k S),  X = (I + L)^-1,  L = beta_t pair_ts (k_t . k_s) below the diagonal
    o      = scores writes + carry_in q S,    scores = pair_ts (q_t . k_s) on and below the diagonal
    S     <- through S + (carry_out k)^T writes

with the decays of `ops/gated_delta_rule/decays.py`. All but the three products with S is done for all chunks at once.
The backward follows the same lines from the last chunk to the first; as (I + L) writes = residual, the gradient of L is
-dresidual writes^T, so that X is never differentiated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.gated_delta_rule.decays import Decays, chunk_decays, layout_masks, log_decay_gradient
from ops.gated_delta_rule.inverse import unit_lower_inverse
from ops.layout import Layout
from ops.precision import accumulation_dtype, without_autocast

# Short chunks are precise: what a time loop takes away from a state token by token cancels in a chunk's fp32 sums, the
# more the fewer features keep keys apart. If K exceeds WIDE, the state is so large that longer chunks, which read it
# less often, are half as fast again.
NARROW, MAX_CHUNK_NARROW = 16, 8
MAX_CHUNK = 16
WIDE, MAX_CHUNK_WIDE = 64, 32


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
    dtype = accumulation_dtype(q, k, v, log_decay, beta)
    size, group = chunk_size(v.shape[1], q.shape[3]), v.shape[2] // q.shape[2]
    if initial_state is None:
        initial_state = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    queries = cut(scale * q.to(dtype), size, dtype, group)
    keys = cut(k, size, dtype, group)
    rest = (cut(z, size, dtype) for z in (v, log_decay, beta))
    masks = layout_masks(layout, size, dtype)
    o, state, *_ = forward(queries, keys, *rest, initial_state.to(dtype), masks)
    return o.transpose(2, 3).movedim(0, 1).flatten(1, 2)[:, : v.shape[1]].to(v.dtype), state


def chunk_size(time: int, keys: int) -> int:
    """C, a power of two, for a sequence of `time` tokens and K = `keys`."""
    longest = MAX_CHUNK_NARROW if keys <= NARROW else MAX_CHUNK if keys <= WIDE else MAX_CHUNK_WIDE
    return min(longest, 1 << (time - 1).bit_length())


def cut(z: Tensor, size: int, dtype: torch.dtype, group: int = 1) -> Tensor:
    """[B, T, H, …] -> [N, B, H * group, C, …]: in chunks of `size`, the last filled up with zeros, each head `group`
    times."""
    z = z.repeat_interleave(group, dim=2) if group > 1 else z
    z, time = z.to(dtype), z.shape[1]
    if time % size:
        z = pad(z, (0,) * (2 * z.dim() - 3) + (-time % size,))
    return z.unflatten(1, (-1, size)).movedim(1, 0).transpose(2, 3).contiguous()


Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("rondo::gated_delta_rule_chunked_forward", mutates_args=())
def forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    masks: list[Tensor],
) -> Forward:
    """o [N, B, HV, C, V] and the last state [B, HV, K, V]; then what the backward needs: the four decays, the keys'
    products, X, the scores, what is written, and all states.

    q, k [N, B, HV, C, K], v [N, B, HV, C, V], log_decay, beta [N, B, HV, C], initial_state [B, HV, K, V], all of one
    dtype; q contains the scale. Without q only the state is computed: o and the scores are empty.
    """
    with without_autocast(k):
        decays = chunk_decays(log_decay, masks)
        similar = product(k, k.mT).mul_(decays.pair)
        x = unit_lower_inverse(similar * beta.unsqueeze(-1))
        key_in, key_out = _weighted_keys(k, beta, decays)
        writes, states = _write(v * beta.unsqueeze(-1), key_in, key_out, decays.through, x, initial_state)
        if q is None:
            o, scores = k.new_empty(0), k.new_empty(0)
        else:
            scores = product(q, k.mT).mul_(decays.pair)
            o = product(q * decays.carry_in.unsqueeze(-1), states[:-1])
            _add_product(o, scores, writes)
    return o, states[-1].clone(), *decays, similar, x, scores, writes, states


@torch.library.custom_op("rondo::gated_delta_rule_chunked_backward", mutates_args=())
def backward(
    do: Tensor | None, dstate: Tensor, q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q (empty without one), k, v, log_decay, beta and the initial state, of those of o (if there is a q)
    and of the last state; `saved` is what `forward` returned after these two."""
    decays, (similar, x, scores, writes, states) = Decays(*saved[:4]), saved[4:]
    with without_autocast(k):
        key_in, key_out = _weighted_keys(k, beta, decays)
        dstates = torch.empty_like(states)
        dstates[-1] = dstate
        if q is None or do is None:
            dwrites = torch.zeros_like(writes)
            dstates[:-1] = 0
        else:
            dwrites, reads = scores.mT @ do, q * decays.carry_in.unsqueeze(-1)
            torch.bmm(reads.mT.flatten(0, 2), do.flatten(0, 2), out=dstates[:-1].flatten(0, 2))
        dresidual = _write_backward(dwrites, dstates, key_in, key_out, decays.through, x)
        dk = product(dresidual, states[:-1].mT)  # of -key_in
        dkey_out = product(writes, dstates[1:].mT)
        from_key_in = (dk * k).sum(-1).neg_().mul_(decays.carry_in)
        dcarry_in = from_key_in * beta
        dcarry_out = (dkey_out * k).sum(-1).mul_(decays.carry_out)
        dthrough = (dstates[1:] * states[:-1]).sum((-2, -1)).mul_(decays.through)
        dlower = product(dresidual, writes.mT).tril_(-1).neg_()
        dsimilar = dlower * similar
        dbeta = (v * dresidual).sum(-1).add_(dsimilar.sum(-1)).add_(from_key_in)
        dpair = dsimilar.mul_(beta.unsqueeze(-1))
        dlower.mul_(decays.pair).mul_(beta.unsqueeze(-1))  # of k k^T
        dk.mul_((decays.carry_in * beta).neg_().unsqueeze(-1)).addcmul_(dkey_out, decays.carry_out.unsqueeze(-1))
        _add_product(dk, dlower.add_(dlower.mT.contiguous()), k)
        if q is None or do is None:
            dq = k.new_empty(0) if q is None else torch.zeros_like(q)
        else:
            dq = product(do, states[:-1].mT)  # of carry_in q
            dcarry_in.addcmul_((dq * q).sum(-1), decays.carry_in)
            dscores = product(do, writes.mT)
            dpair.addcmul_(dscores, scores)
            dscores.mul_(decays.pair)  # of q k^T
            dq.mul_(decays.carry_in.unsqueeze(-1))
            _add_product(dq, dscores, k)
            _add_product(dk, dscores.mT, q)
        dlog_decay = log_decay_gradient(dpair, dcarry_in, dcarry_out, dthrough)
    return dq, dk, dresidual * beta.unsqueeze(-1), dlog_decay, dbeta, dstates[0].clone()


@forward.register_fake
def _(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    masks: list[Tensor],
) -> Forward:
    chunks, *heads, size, key_dim = k.shape
    pair = k.new_empty(chunks, *heads, size, size)
    o, scores = (k.new_empty(0), k.new_empty(0)) if q is None else (torch.empty_like(v), torch.empty_like(pair))
    carry = (torch.empty_like(beta), torch.empty_like(beta), k.new_empty(chunks, *heads))
    states = k.new_empty(chunks + 1, *heads, key_dim, v.shape[-1])
    products = (torch.empty_like(pair), torch.empty_like(pair), scores)
    return o, torch.empty_like(initial_state), pair, *carry, *products, torch.empty_like(v), states


@backward.register_fake
def _(
    do: Tensor | None, dstate: Tensor, q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, saved: list[Tensor]
) -> tuple[Tensor, ...]:
    dq = k.new_empty(0) if q is None else torch.empty_like(q)
    return dq, *(torch.empty_like(z) for z in (k, v, beta, beta, dstate))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    q, k, v, _, beta, _, masks = inputs
    ctx.without_gradient = [None] * len(masks)
    ctx.set_materialize_grads(False)  # or each output that the backward needs would get a gradient of zeros
    ctx.save_for_backward(q, k, v, beta, *output[1:])


def _backward(ctx: Any, do: Tensor | None, dstate: Tensor | None, *_: None) -> tuple[Any, ...]:
    q, k, v, beta, state, *saved = ctx.saved_tensors
    dstate = torch.zeros_like(state) if dstate is None else dstate.contiguous()
    dq, *gradients = backward(do if do is None else do.contiguous(), dstate, q, k, v, beta, saved)
    return None if q is None else dq, *gradients, ctx.without_gradient


forward.register_autograd(_backward, setup_context=_setup_context)


def _weighted_keys(k: Tensor, beta: Tensor, decays: Decays) -> tuple[Tensor, Tensor]:
    """[N, B, HV, C, K] each: what reads the state a chunk starts from, and what writes into the one it ends in."""
    return k * (decays.carry_in * beta).unsqueeze(-1), k * decays.carry_out.unsqueeze(-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in which no more than WIDE features are summed in one chain: the time loop's sums are pairwise, and longer
    chains would err more than twice as much."""
    if a.shape[-1] <= WIDE:
        return a @ b
    half = a.shape[-1] // 2
    return product(a[..., :half], b[..., :half, :]).add_(product(a[..., half:], b[..., half:, :]))


def _add_product(total: Tensor, a: Tensor, b: Tensor, alpha: int = 1) -> None:
    """total += alpha * a @ b, in place."""
    if a.shape[-1] <= WIDE:
        total.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3), alpha=alpha)
    else:
        total.add_(product(a, b), alpha=alpha)


def _write(
    values: Tensor, key_in: Tensor, key_out: Tensor, through: Tensor, x: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """What every token writes [N, B, HV, C, V], and the states before each chunk and after the last
    [N + 1, B, HV, K, V]; `values` is beta v and becomes the residual."""
    states = values.new_empty(len(values) + 1, *initial_state.shape)
    states[0] = initial_state
    writes = torch.empty_like(values)
    state, *chunks = (z.flatten(1, 2) for z in (states, values, writes, key_in, key_out, x, through))
    for n, (residual, write, reads, keys, solve, decay) in enumerate(zip(*chunks)):
        _add_product(residual, reads, state[n], alpha=-1)
        torch.bmm(solve, residual, out=write)
        torch.mul(state[n], decay[:, None, None], out=state[n + 1]).baddbmm_(keys.mT, write)
    return writes, states


def _write_backward(
    dwrites: Tensor, dstates: Tensor, key_in: Tensor, key_out: Tensor, through: Tensor, x: Tensor
) -> Tensor:
    """The gradient of the residual [N, B, HV, C, V].

    `dwrites` and `dstates` [N + 1, B, HV, K, V] come with what the outputs and the last state contribute to the
    gradients of writes and states, and leave complete.
    """
    dresiduals = torch.empty_like(dwrites)
    state, *chunks = (z.flatten(1, 2) for z in (dstates, dwrites, dresiduals, key_in, key_out, x, through))
    for n, (dwrite, dresidual, reads, keys, solve, decay) in reversed(list(enumerate(zip(*chunks)))):
        _add_product(dwrite, keys, state[n + 1])
        torch.bmm(solve.mT, dwrite, out=dresidual)
        state[n].addcmul_(state[n + 1], decay[:, None, None]).baddbmm_(reads.mT, dresidual, alpha=-1)
    return dresiduals
