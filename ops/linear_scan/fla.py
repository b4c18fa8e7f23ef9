"""linear_scan by flash-linear-attention's fused_recurrent_hgrn, whose recurrence is h_t = exp(g_t) h_{t-1} + x_t.

Its chunk_hgrn is not used: it gives no gradient of the initial state, ignores that of the last one and knows no
documents. These kernels know documents as sequences of one long row, each with a state of its own.
"""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.sequences import sequences_of


def linear_scan(
    x: Tensor, log_decay: Tensor, layout: Layout | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last state [B, D]; arguments as in `ops.linear_scan`.

    x is widened to fp32, as the kernels return the last state in x's dtype. Raises ValueError for float64.
    """
    from fla.ops.hgrn import fused_recurrent_hgrn

    if accumulation_dtype(x, log_decay) == torch.float64:
        raise ValueError("linear_scan: float64 inputs; impl 'fla' computes in fp32: choose 'chunked'")
    state = None if initial_state is None else initial_state.float()
    if layout is None:
        y, state = fused_recurrent_hgrn(x.float(), log_decay, initial_state=state, output_final_state=True)
        return y.to(x.dtype), state
    sequences = layout.derive(sequences_of)
    if state is not None:
        state = state.masked_fill(layout.positions[:, :1] == 0, 0)
        every = state.new_zeros(len(sequences.borders) - 1, state.shape[1])
        state = every.index_copy(0, sequences.first, state)
    y, states = fused_recurrent_hgrn(
        x.float().flatten(0, 1)[None],
        log_decay.flatten(0, 1)[None],
        initial_state=state,
        output_final_state=True,
        cu_seqlens=sequences.borders,
    )
    return y.view(x.shape).to(x.dtype), states[sequences.last]
