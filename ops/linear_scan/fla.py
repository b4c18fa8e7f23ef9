"""linear_scan by flash-linear-attention's fused_recurrent_hgrn, whose recurrence is h_t = exp(g_t) h_{t-1} + x_t.

Its chunk_hgrn is not used: it gives no gradient of the initial state, ignores that of the last one and knows no
documents. These kernels know documents as sequences of one long row, each with a state of its own.
"""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.sequences import run_recurrence


def linear_scan(
    x: Tensor, log_decay: Tensor, layout: Layout | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last state [B, D]; arguments as in `ops.linear_scan`.

    x is widened to fp32, as the kernels return the last state in x's dtype. Raises ValueError for float64.
    """
    from fla.ops.hgrn import fused_recurrent_hgrn

    if accumulation_dtype(x, log_decay) == torch.float64:
        raise ValueError("linear_scan: float64 inputs; impl 'fla' computes in fp32: choose 'chunked'")
    tensors = x.float(), log_decay
    y, state = run_recurrence(fused_recurrent_hgrn, *tensors, layout=layout, initial_state=initial_state)
    return y.to(x.dtype), state
