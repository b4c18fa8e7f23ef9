"""A stretch of tokens cut into chunks that are computed side by side."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Tokens start to stop of every row as `chunks` chunks of `size` tokens, a power of two; a single one may be short
    of it and is filled up with zeros."""

    start: int
    stop: int
    chunks: int
    size: int

    def split(self, z: Tensor) -> Tensor:
        """The tile's part of z [B, T, H, F], a view [chunks, B, H, <= size, F]."""
        return z[:, self.start : self.stop].unflatten(1, (self.chunks, -1)).permute(1, 0, 3, 2, 4)

    def load(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of the tile's part of z [B, T, H, F], [chunks * B * H, size, F]."""
        part = self.split(z)
        if part.shape[3] < self.size:
            part = torch.nn.functional.pad(part, (0, 0, 0, self.size - part.shape[3]))
        return part.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 2)

    def store(self, part: Tensor, z: Tensor) -> None:
        """Write what `load` would read, without the filling."""
        target = self.split(z)
        target.copy_(part.view(*target.shape[:3], *part.shape[1:])[:, :, :, : target.shape[3]])
