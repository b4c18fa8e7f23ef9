"""gated_linear_attention by flash-linear-attention's chunk kernels.

They know documents as sequences of one long row, each with a state of its own. Inside a chunk they subtract cumulative
sums of log decays, so that -inf gives NaN, and -1e4 beside ordinary decays costs those their precision.
"""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.sequences import run_recurrence

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
    tensors = q.to(v.dtype), k.to(v.dtype), v, log_decay
    o, state = run_recurrence(chunk_gla, *tensors, layout=layout, initial_state=initial_state, scale=scale)
    return o.to(v.dtype), state
