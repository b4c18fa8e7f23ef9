"""gated_delta_rule by flash-linear-attention's chunk kernels.

They know documents as sequences of one long row, each with a state of its own. Inside a chunk they subtract cumulative
sums of log decays, so that -inf gives NaN, and -1e4 beside ordinary decays costs those their precision.
"""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.sequences import run_recurrence

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
    tensors = q.to(v.dtype), k.to(v.dtype), v, log_decay, beta
    o, state = run_recurrence(chunk_gated_delta_rule, *tensors, layout=layout, initial_state=initial_state, scale=scale)
    return o.to(v.dtype), state
