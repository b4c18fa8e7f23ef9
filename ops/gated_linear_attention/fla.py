"""gated_linear_attention by flash-linear-attention's chunk kernels.

They know documents as sequences of one long row, each with a state of its own. Inside a chunk they subtract cumulative
sums of log decays, so that -inf gives NaN, and -1e4 beside ordinary decays costs those their precision.
"""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.sequences import sequences_of

MAX_KEY_DIM = 512


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the last state [B, H, K, V]; arguments as in `ops.gated_linear_attention`.

    q and k are rounded to v's dtype. Raises ValueError for float64 and for K > 512.
    """
    from fla.ops.gla import chunk_gla

    if accumulation_dtype(q, k, v, log_decay) == torch.float64:
        raise ValueError("gated_linear_attention: float64 inputs; 'fla' computes in fp32: choose 'chunked'")
    if q.shape[3] > MAX_KEY_DIM:
        raise ValueError(
            f"gated_linear_attention: q has K = {q.shape[3]} features; 'fla' takes at most {MAX_KEY_DIM}: choose "
            f"'chunked'"
        )
    inputs = q.to(v.dtype), k.to(v.dtype), v, log_decay
    state = None if initial_state is None else initial_state.float()
    if layout is None:
        o, state = chunk_gla(*inputs, scale=scale, initial_state=state, output_final_state=True)
        return o.to(v.dtype), state
    sequences = layout.derive(sequences_of)
    if state is not None:
        state = state.masked_fill((layout.positions[:, 0] == 0)[:, None, None, None], 0)
        every = state.new_zeros(len(sequences.borders) - 1, *state.shape[1:])
        state = every.index_copy(0, sequences.first, state)
    o, states = chunk_gla(
        *(z.flatten(0, 1).unsqueeze(0) for z in inputs),
        scale=scale,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=sequences.borders,
    )
    return o.view(v.shape).to(v.dtype), states[sequences.last]
