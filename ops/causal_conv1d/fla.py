"""causal_conv1d by flash-linear-attention's kernels.

They know documents as sequences of one long row, each with a state of its own, and keep W inputs of x's dtype as a
state, of which the oldest is never used.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.layout import Layout
from ops.sequences import sequences_of


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layout: Layout | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last W-1 inputs [B, W-1, D]; arguments as in `ops.causal_conv1d`.

    Raises ValueError for float64.
    """
    from fla.modules.causal_conv1d import ops as kernels

    if x.dtype == torch.float64:
        raise ValueError(
            "causal_conv1d: x has dtype torch.float64; the implementation 'fla' sums in fp32: use 'chunked'"
        )
    batch, time, width = x.shape
    window = weight.shape[1]
    if layout is None:
        state = None if initial_state is None else _theirs(initial_state)
        y, state = kernels.causal_conv1d(
            x, weight, bias, initial_state=state, output_final_state=True, activation=activation
        )
        return y, _ours(state)
    sequences = layout.derive(sequences_of)
    states = None
    if initial_state is not None:
        age = torch.arange(window - 1, 0, -1, device=x.device)  # of each held input, in tokens before the first
        seen = initial_state.masked_fill((age > layout.positions[:, :1])[:, :, None], 0)
        states = seen.new_zeros(len(sequences.borders) - 1, window - 1, width).index_copy(0, sequences.first, seen)
        states = _theirs(states)
    y, states = kernels.causal_conv1d(
        x.reshape(1, batch * time, width),
        weight,
        bias,
        initial_state=states,
        output_final_state=True,
        activation=activation,
        cu_seqlens=sequences.borders,
    )
    return y.view(batch, time, width), _ours(states[sequences.last])


def _theirs(state: Tensor) -> Tensor:
    """[N, W-1, D] -> [N, D, W]"""
    return pad(state.transpose(1, 2), (1, 0)).contiguous()


def _ours(state: Tensor) -> Tensor:
    """[N, D, W] -> fp32 [N, W-1, D]"""
    return state[:, :, 1:].transpose(1, 2).float()
