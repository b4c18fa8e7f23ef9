"""Documents as sequences of the rows laid end to end: how variable-length kernels of other projects know them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from ops.layout import Layout


class Sequences(NamedTuple):
    """Documents, also those that continue from the row before, as sequences of the rows laid end to end."""

    borders: Tensor  # int64 [N + 1]
    first: Tensor  # int64 [B], of each row's sequences
    last: Tensor  # int64 [B]


def sequences_of(positions: Tensor) -> Sequences:
    """Waits for the device, once a layout."""
    starts = positions == 0
    starts[:, 0] = True
    begins = starts.flatten().nonzero().flatten()
    last = starts.sum(1).cumsum(0) - 1
    return Sequences(pad(begins, (0, 1), value=positions.numel()), last - starts.sum(1) + 1, last)


def run_recurrence(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    *tensors: Tensor,
    layout: Layout | None,
    initial_state: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The output [B, T, ...] and the last state [B, ...] of a kernel of flash-linear-attention on tensors [B, T, ...].

    Such kernels take the state as `initial_state` in fp32, one a sequence, and sequences of one long row as
    `cu_seqlens`.
    """
    state = None if initial_state is None else initial_state.float()
    if layout is None:
        return kernel(*tensors, initial_state=state, output_final_state=True, **options)
    sequences = layout.derive(sequences_of)
    if state is not None:
        fresh = (layout.positions[:, 0] == 0).view(-1, *(1,) * (state.dim() - 1))
        every = state.new_zeros(len(sequences.borders) - 1, *state.shape[1:])
        state = every.index_copy(0, sequences.first, state.masked_fill(fresh, 0))
    o, states = kernel(
        *(z.flatten(0, 1).unsqueeze(0) for z in tensors),
        initial_state=state,
        output_final_state=True,
        cu_seqlens=sequences.borders,
        **options,
    )
    return o.view(*layout.positions.shape, *o.shape[2:]), states[sequences.last]
