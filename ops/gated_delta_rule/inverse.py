"""The inverse of a unit lower triangular matrix, block by block."""

import torch
from torch import Tensor

# Below this size a batch of matrix products costs more in calls than in work: multiply and sum over all blocks at once.
SMALL = 8


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 of `lower` [..., C, C], C a power of two, of which only what lies below the diagonal is read as L.

    From blocks of 1, whose inverse is 1, to blocks twice as large: the inverse of [[A, 0], [L21, D]] has A^-1 and D^-1
    on its diagonal and -D^-1 L21 A^-1 below. Each step is a forward substitution by blocks and as stable as one; the
    shorter product (I - L)(I + L^2)(I + L^4)… loses everything where powers of L are large and cancel.
    """
    size = lower.shape[-1]
    flat = lower.reshape(-1, size, size)
    x = flat.new_ones(1, 1, len(flat) * size)  # blocks last: [b, b, blocks]
    while (block := x.shape[0]) < min(size, SMALL):
        left, right = x.unflatten(2, (-1, 2)).unbind(3)
        below = _off_diagonal(flat, block).flatten(2)
        if block > 1:
            below = (right[:, :, None] * below).sum(1)
            below = (below[:, :, None] * left).sum(1)
        x = torch.cat([torch.cat([left, torch.zeros_like(left)], 1), torch.cat([-below, right], 1)], 0)
    x = x.permute(2, 0, 1).contiguous()  # [blocks, b, b]
    while (block := x.shape[1]) < size:
        left, right = x.unflatten(0, (-1, 2)).unbind(1)
        below = _off_diagonal(flat, block).permute(2, 3, 0, 1).reshape(-1, block, block)
        doubled = x.new_zeros(len(below), 2 * block, 2 * block)
        doubled[:, :block, :block], doubled[:, block:, block:] = left, right
        doubled[:, block:, :block] = torch.bmm(torch.bmm(right, below), left).neg_()
        x = doubled
    return x.view(lower.shape)


def _off_diagonal(matrix: Tensor, block: int) -> Tensor:
    """The blocks below the diagonal in each diagonal block of twice the size: [M, C, C] -> [b, b, M, C / 2b]."""
    pairs = matrix.unflatten(2, (-1, 2 * block)).unflatten(1, (-1, 2 * block))  # [M, n, 2b, n, 2b]
    return pairs.diagonal(dim1=1, dim2=3)[:, block:, :block].permute(1, 2, 0, 3)
