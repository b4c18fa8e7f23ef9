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
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ops.gated_delta_rule.decays import Decays, chunk_decays, log_decay_gradient
from ops.gated_delta_rule.inverse import unit_lower_inverse
from ops.layout import Layout
from ops.precision import accumulation_dtype, without_autocast

# Twice as many tokens are a little faster where K is 128, and half as precise: a chunk's own tokens are summed in fp32.
MAX_CHUNK = 32


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
    batch, time, value_heads, value_dim = v.shape
    size = min(MAX_CHUNK, 1 << (time - 1).bit_length())
    group = value_heads // q.shape[2]
    if initial_state is None:
        initial_state = v.new_zeros(batch, value_heads, q.shape[3], value_dim, dtype=dtype)

    def chunks(z: Tensor) -> Tensor:  # [B, T, HV, …] -> [N, B, HV, C, …], filled up with zeros
        z = z.to(dtype)
        if time % size:
            z = pad(z, (0,) * (2 * z.dim() - 3) + (-time % size,))
        return z.unflatten(1, (-1, size)).movedim(1, 0).transpose(2, 3).contiguous()

    queries, keys = ((chunks(z.repeat_interleave(group, dim=2) if group > 1 else z)) for z in (scale * q.to(dtype), k))
    o, state = GatedDeltaRule.apply(
        queries, keys, chunks(v), chunks(log_decay), chunks(beta), initial_state.to(dtype), layout
    )
    return o.transpose(2, 3).movedim(0, 1).flatten(1, 2)[:, :time].to(v.dtype), state


class GatedDeltaRule(torch.autograd.Function):
    """(q, k [N, B, HV, C, K], v [N, B, HV, C, V], log_decay, beta [N, B, HV, C], initial_state [B, HV, K, V], layout)
    -> (o [N, B, HV, C, V], state [B, HV, K, V])."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        layout: Layout | None,
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(q):
            decays = chunk_decays(log_decay, layout)
            similar = (k @ k.mT).mul_(decays.pair)
            x = unit_lower_inverse(similar * beta.unsqueeze(-1))
            scores = (q @ k.mT).mul_(decays.pair)
            key_in, key_out = _weighted_keys(k, beta, decays)
            writes, states = _write(v * beta.unsqueeze(-1), key_in, key_out, decays.through, x, initial_state)
            o = (q * decays.carry_in.unsqueeze(-1)) @ states[:-1]
            _add_product(o, scores, writes)
        ctx.save_for_backward(q, k, v, beta, *decays, similar, x, scores, writes, states)
        return o, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, *factors, similar, x, scores, writes, states = ctx.saved_tensors
        decays = Decays(*factors)
        with without_autocast(do):
            key_in, key_out = _weighted_keys(k, beta, decays)
            dwrites, dstates = scores.mT @ do, (q * decays.carry_in.unsqueeze(-1)).mT @ do
            dresidual, dstates = _write_backward(dwrites, dstates, key_in, key_out, decays.through, x, dstate)
            dq, dk = do @ states[:-1].mT, dresidual @ states[:-1].mT  # of carry_in q and of -key_in
            dkey_out = writes @ dstates[1:].mT
            from_key_in = (dk * k).sum(-1).neg_().mul_(decays.carry_in)
            dcarry_in = (dq * q).sum(-1).mul_(decays.carry_in).addcmul_(from_key_in, beta)
            dcarry_out = (dkey_out * k).sum(-1).mul_(decays.carry_out)
            dthrough = (dstates[1:] * states[:-1]).sum((-2, -1)).mul_(decays.through)
            dscores, dlower = do @ writes.mT, (dresidual @ writes.mT).tril_(-1).neg_()
            dsimilar = dlower * similar
            dbeta = (v * dresidual).sum(-1).add_(dsimilar.sum(-1)).add_(from_key_in)
            dpair = dsimilar.mul_(beta.unsqueeze(-1)).addcmul_(dscores, scores)
            dlog_decay = log_decay_gradient(dpair, dcarry_in, dcarry_out, dthrough)
            dscores.mul_(decays.pair)  # of q k^T
            dlower.mul_(decays.pair).mul_(beta.unsqueeze(-1))  # of k k^T
            dq.mul_(decays.carry_in.unsqueeze(-1))
            dk.mul_((decays.carry_in * beta).neg_().unsqueeze(-1)).addcmul_(dkey_out, decays.carry_out.unsqueeze(-1))
            _add_product(dq, dscores, k)
            _add_product(dk, dscores.mT, q)
            _add_product(dk, dlower.add_(dlower.mT.contiguous()), k)
        return dq, dk, dresidual * beta.unsqueeze(-1), dlog_decay, dbeta, dstates[0], None


def _weighted_keys(k: Tensor, beta: Tensor, decays: Decays) -> tuple[Tensor, Tensor]:
    """[N, B, HV, C, K] each: what reads the state a chunk starts from, and what writes into the one it ends in."""
    return k * (decays.carry_in * beta).unsqueeze(-1), k * decays.carry_out.unsqueeze(-1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place."""
    total.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


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
        residual.baddbmm_(reads, state[n], alpha=-1)
        torch.bmm(solve, residual, out=write)
        torch.mul(state[n], decay[:, None, None], out=state[n + 1]).baddbmm_(keys.mT, write)
    return writes, states


def _write_backward(
    dwrites: Tensor, dreads: Tensor, key_in: Tensor, key_out: Tensor, through: Tensor, x: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the residual [N, B, HV, C, V] and of the states [N + 1, B, HV, K, V].

    `dwrites` and `dreads` [N, B, HV, K, V] hold what the outputs contribute to the gradients of writes and states.
    """
    dstates = torch.cat([dreads, dstate.unsqueeze(0)])
    dresiduals = torch.empty_like(dwrites)
    state, *chunks = (z.flatten(1, 2) for z in (dstates, dwrites, dresiduals, key_in, key_out, x, through))
    for n, (dwrite, dresidual, reads, keys, solve, decay) in reversed(list(enumerate(zip(*chunks)))):
        dwrite.baddbmm_(keys, state[n + 1])
        torch.bmm(solve.mT, dwrite, out=dresidual)
        state[n].addcmul_(state[n + 1], decay[:, None, None]).baddbmm_(reads.mT, dresidual, alpha=-1)
    return dresiduals, dstates
