"""gated_delta_rule as a loop over time, to be held against the equation."""

import torch
from torch import Tensor

from ops.layout import Layout
from ops.precision import accumulation_dtype


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

    The product (I - beta k k^T) S is taken as S - beta k (k^T S), sums over K as multiply-and-sum, which autocast
    leaves in fp32.
    """
    dtype = accumulation_dtype(q, k, v, log_decay, beta)
    group = v.shape[2] // q.shape[2]
    queries, keys = (z.to(dtype).repeat_interleave(group, dim=2)[..., None] for z in (q, k))  # [B, T, HV, K, 1]
    decay = log_decay.to(dtype).exp()[..., None, None]
    values, strength = v.to(dtype).unsqueeze(-2), beta.to(dtype)[..., None, None]  # [B, T, HV, 1, V or 1]
    shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    state = v.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        if layout is not None:
            state = state.masked_fill(layout.starts[:, t, None, None, None], 0)
        state = decay[:, t] * state
        held = (keys[:, t] * state).sum(-2, keepdim=True)  # k^T S, [B, HV, 1, V]
        state = state + keys[:, t] * (strength[:, t] * (values[:, t] - held))
        outputs.append(scale * (queries[:, t] * state).sum(-2))
    return torch.stack(outputs, dim=1).to(v.dtype), state
