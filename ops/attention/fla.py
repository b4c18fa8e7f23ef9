"""attention and local_attention by flash-linear-attention's kernel, documents as sequences of different lengths."""

import torch
from torch import Tensor

from ops.attention.inputs import State
from ops.layout import Layout
from ops.precision import product_dtype, without_autocast
from ops.sequences import sequences_of

MAX_WIDTH = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: State | None,
    window: int | None = None,
) -> tuple[Tensor, State]:
    """o [B, T, H, K] and the keys and values [B, T, G, K]; arguments as in `ops.attention`, `ops.local_attention`.

    Raises ValueError for float64, for K > 256, and for a state: each key of theirs has a query.
    """
    from fla.ops.attn import parallel as theirs

    op, dtype = "attention" if window is None else "local_attention", product_dtype(q, k)
    if dtype == torch.float64:
        raise ValueError(f"{op}: float64 inputs; 'fla' computes in fp32: choose 'chunked'")
    if q.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"{op}: q has {q.shape[-1]} features a head; 'fla' needs {MAX_WIDTH} at most; choose 'chunked'"
        )
    if initial_state is not None and initial_state[0].shape[1]:
        raise ValueError(
            f"{op}: initial_state holds {initial_state[0].shape[1]} keys; 'fla' takes none; choose 'chunked' or 'flex'"
        )
    inputs, borders = [z.to(dtype) for z in (q, k, v)], None
    if layout is not None:
        inputs, borders = [z.flatten(0, 1).unsqueeze(0) for z in inputs], layout.derive(sequences_of).borders
    with without_autocast(q):
        o = theirs.parallel_attn(*inputs, scale=scale, window_size=window, cu_seqlens=borders)
    return o.reshape(q.shape).to(q.dtype), (k, v)
