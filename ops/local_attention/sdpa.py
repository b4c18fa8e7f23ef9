"""local_attention through torch's scaled_dot_product_attention, in blocks of C >= W queries, each of which sees its
own block of keys and the one before."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.attention.inputs import State, prepend
from ops.attention.sdpa import masked_attention, sdpa
from ops.layout import Layout

# Below this many queries a block's matrix products are too small to be fast.
MIN_BLOCK = 64


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Layout | None, initial_state: State | None, window: int
) -> tuple[Tensor, State]:
    """o [B, T, H, K] and the keys and values [B, S+T, G, K]; arguments as in `ops.local_attention`."""
    state = prepend(initial_state, k, v)
    block = max(window, MIN_BLOCK)
    if q.shape[1] <= 2 * block:
        return masked_attention(q, *state, scale, layout, window), state
    return _blocked_attention(q, *state, scale, layout, window, block), state


def _blocked_attention(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, layout: Layout | None, window: int, block: int
) -> Tensor:
    batch, time, heads, width = q.shape
    num_previous = min(keys.shape[1] - time, block)
    num_blocks = -(-time // block)
    tail = num_blocks * block - time
    if layout is None:
        positions = torch.arange(num_previous, num_previous + time, device=q.device).expand(batch, time)
        mask = visible_in_blocks(positions, num_previous, window, block)
    else:
        mask = layout.derive(visible_in_blocks, num_previous, window, block)

    def pairs(z: Tensor) -> Tensor:  # [B, S+T, G, K] -> [B * blocks, 2C, G, K]
        z = pad(z[:, -(num_previous + time) :], (0, 0, 0, 0, block - num_previous, tail))
        z = z.unflatten(1, (num_blocks + 1, block))
        return torch.cat([z[:, :-1], z[:, 1:]], dim=2).flatten(0, 1)

    queries = pad(q, (0, 0, 0, 0, 0, tail)).reshape(batch * num_blocks, block, heads, width)
    o = sdpa(queries, pairs(keys), pairs(values), scale, mask)
    return o.reshape(batch, num_blocks * block, heads, width)[:, :time]


def visible_in_blocks(positions: Tensor, num_previous: int, window: int, block: int) -> Tensor:
    """bool [B * blocks, 1, C, 2C]: whether a query sees a key of its own block of C or of the one before."""
    time = positions.shape[1]
    t = torch.arange(time, device=positions.device)
    reach = torch.minimum(positions.clamp(max=window - 1), t + num_previous)  # keys before those held are padding
    reach = pad(reach, (0, -time % block)).unflatten(1, (-1, block)).flatten(0, 1)  # [B * blocks, C]
    i = torch.arange(block, device=positions.device)
    distance = i[:, None] + block - torch.arange(2 * block, device=positions.device)
    return ((distance >= 0) & (distance <= reach[:, :, None])).unsqueeze(1)
