"""What the scalar decays of a chunk multiply, and where its documents cut."""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.layout import Layout


class Decays(NamedTuple):
    """The decay between every two moments of a chunk of C tokens, 0 where a document starts between them.

    pair [..., C, C]: from after token s to after token t >= s, 0 above the diagonal, 1 on it;
    carry_in [..., C]: from before the chunk to after t;  carry_out [..., C]: from after s to the end;
    through [...]: from before the chunk to its end.
    """

    pair: Tensor
    carry_in: Tensor
    carry_out: Tensor
    through: Tensor


class Masks(NamedTuple):
    """The same four as 1 and 0, `[N, B, 1, …]` over N chunks: whether no document starts on the way."""

    pair: Tensor
    carry_in: Tensor
    carry_out: Tensor
    through: Tensor


def chunk_masks(positions: Tensor, size: int, dtype: torch.dtype) -> Masks:
    """`positions` [B, T] cut into N chunks of `size`; tokens that fill up the last go on with its document."""
    batch, time = positions.shape
    fill = positions[:, -1:] + torch.arange(1, -time % size + 1, device=positions.device)
    p = torch.cat([positions, fill], dim=1).view(batch, -1, 1, size).transpose(0, 1)  # [N, B, 1, C]
    r = torch.arange(size, device=positions.device)
    last = p[..., -1:]
    masks = (r[:, None] - r <= p[..., None], p > r, size - 1 - r <= last, last[..., 0] > size - 1)
    return Masks(*(mask.to(dtype) for mask in masks))


def layout_masks(layout: Layout | None, size: int, dtype: torch.dtype) -> list[Tensor]:
    """The four masks of a layout's chunks of `size`; none where rows are unbroken."""
    return [] if layout is None else list(layout.derive(chunk_masks, size, dtype))


def chunk_decays(log_decay: Tensor, masks: list[Tensor]) -> Decays:
    """From `log_decay` [N, B, HV, C], C a power of two, and `layout_masks` of the same chunks.

    By halving: in blocks of 1, 2, 4, … tokens the sums of log decays from the block's first token up to each one and
    from after each one to the block's last are kept; the pairs between the right and the left half of a block are an
    outer product of their exponentials. Every exponent is a sum over its own interval and <= 0, so neither 0, nor -1e4
    beside ordinary decays, nor -inf costs precision, as differences of cumulative sums would.
    """
    size = log_decay.shape[-1]
    pair = torch.zeros((*log_decay.shape, size), dtype=log_decay.dtype, device=log_decay.device)
    pair.diagonal(dim1=-2, dim2=-1).fill_(1)
    up_to, after = log_decay.unsqueeze(-1), torch.zeros_like(log_decay).unsqueeze(-1)  # [..., blocks, b]
    while (block := up_to.shape[-1]) < size:
        (left, right), (left_after, right_after) = (z.unflatten(-2, (-1, 2)).unbind(-2) for z in (up_to, after))
        corners = pair.unflatten(-1, (-1, 2 * block)).unflatten(-3, (-1, 2 * block))  # [..., n, 2b, n, 2b]
        corners = corners.diagonal(dim1=-4, dim2=-2)[..., block:, :block, :].movedim(-1, -3)
        corners.copy_(right.exp().unsqueeze(-1) * left_after.exp().unsqueeze(-2))
        up_to = torch.cat([left, left[..., -1:] + right], dim=-1)
        after = torch.cat([left_after + right[..., -1:], right_after], dim=-1)
    decays = Decays(pair, up_to[..., 0, :].exp(), after[..., 0, :].exp(), up_to[..., 0, -1].exp())
    for decay, mask in zip(decays, masks):
        decay.mul_(mask)
    return decays


def log_decay_gradient(pair: Tensor, carry_in: Tensor, carry_out: Tensor, through: Tensor) -> Tensor:
    """The gradient of `log_decay` [..., C] from the gradients of the logarithms of the four (decay times its gradient).

    Token i's decay lies on every way from s < i to t >= i. Sums of what counts, no difference of larger sums.
    """
    size = carry_in.shape[-1]
    before = torch.ones(size, size, dtype=pair.dtype, device=pair.device).triu(1)  # [s, i]: s < i
    ways = torch.matmul(pair, before).tril_().sum(-2)  # over t >= i
    ways += carry_in.flip(-1).cumsum(-1).flip(-1)
    ways += torch.matmul(carry_out.unsqueeze(-2), before).squeeze(-2)
    return ways.add_(through.unsqueeze(-1))
