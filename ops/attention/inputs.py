"""What full and windowed attention ask of their arguments, and the keys before a call joined to its own."""

import torch
from torch import Tensor

from ops.check import check_dim, check_floating, check_layout, check_shape
from ops.layout import Layout

# Keys and values of the tokens before a call, [B, S, G, K] each.
State = tuple[Tensor, Tensor]


def check_inputs(op: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, state: State | None) -> None:
    """Raise ValueError unless shapes and dtypes are those that the docstring of `ops.attention` names."""
    check_dim(op, "q", q, "B T H K")
    check_dim(op, "k", k, "B T G K")
    batch, time, heads, width = q.shape
    groups = k.shape[2]
    if heads % groups:
        raise ValueError(f"{op}: k has {groups} heads; must divide the {heads} heads of q: repeat the heads of k and v")
    check_shape(op, "k", k, "B T G K", batch, time, groups, width)
    check_shape(op, "v", v, "B T G K", batch, time, groups, width)
    if state is not None:
        length = state[0].shape[1] if state[0].dim() == 4 else 0
        for name, tensor in zip(("k", "v"), state):
            check_shape(op, f"initial_state {name}", tensor, "B S G K", batch, length, groups, width)
    check_floating(op, q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; must be the same")
    check_layout(op, layout, batch, time)


def prepend(state: State | None, k: Tensor, v: Tensor) -> State:
    """Keys and values [B, S+T, G, K] of the state and of the call."""
    if state is None:
        return k, v
    return torch.cat([state[0].to(k.dtype), k], dim=1), torch.cat([state[1].to(v.dtype), v], dim=1)
