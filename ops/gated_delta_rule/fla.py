"""gated_delta_rule by flash-linear-attention's chunk kernels.

They know documents as sequences of one long row, each with a state of its own. Inside a chunk they subtract cumulative
sums of log decays, so that -inf gives NaN, and -1e4 beside ordinary decays costs those their precision.
"""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.sequences import sequences_of

MAX_KEY_DIM = 256


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
    """o [B, T, HV, V] and the last state [B, HV, K, V]; arguments as in `ops.gated_delta_rule`.

    q and k are rounded to v's dtype. Raises ValueError for float64 and for K > 256.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    if accumulation_dtype(q, k, v, log_decay, beta) == torch.float64:
        raise ValueError("gated_delta_rule: float64 inputs; 'fla' computes in fp32: choose 'chunked'")
    if q.shape[3] > MAX_KEY_DIM:
        raise ValueError(
            f"gated_delta_rule: q has K = {q.shape[3]} features; 'fla' takes at most {MAX_KEY_DIM}: choose 'chunked'"
        )
    inputs = q.to(v.dtype), k.to(v.dtype), v, log_decay, beta
    state = None if initial_state is None else initial_state.float()
    options = {"scale": scale, "output_final_state": True}
    if layout is None:
        o, state = chunk_gated_delta_rule(*inputs, initial_state=state, **options)
        return o.to(v.dtype), state
    sequences = layout.derive(sequences_of)
    if state is not None:
        state = state.masked_fill((layout.positions[:, 0] == 0)[:, None, None, None], 0)
        every = state.new_zeros(len(sequences.borders) - 1, *state.shape[1:])
        state = every.index_copy(0, sequences.first, state)
    o, states = chunk_gated_delta_rule(
        *(z.flatten(0, 1).unsqueeze(0) for z in inputs),
        initial_state=state,
        cu_seqlens=sequences.borders,
        **options,
    )
    return o.view(v.shape).to(v.dtype), states[sequences.last]
