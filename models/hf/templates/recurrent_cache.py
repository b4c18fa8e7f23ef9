"""What a `RondoForCausalLM` remembers of the tokens it has read."""

from typing import Any

import torch
from torch import Tensor


class RecurrentCache:
    """The state of every block, batch first; memory that does not grow with the length but for full attention.

    Attributes:
        state: one entry a block, its mixer's own; None before the first token.
        next_positions: int64 `[B]`, of each row's next token in its document; None before the first token.
        num_tokens: read so far, padding included.
        closed: whether a row ends in padding, so that it cannot be continued.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.state: tuple[Any, ...] | None = None
        self.next_positions: Tensor | None = None
        self.num_tokens = 0
        self.closed = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; int64 `[B]`."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, int64 `[B']` or bool `[B]`."""
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, beside itself."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, max_length: int) -> None:
        raise ValueError(
            f"crop: {max_length}; a recurrent state cannot forget its last tokens: read the sequence again, and "
            "generate without an assistant model"
        )

    def _rows(self, change: Any) -> None:
        if self.state is not None:
            self.state = torch.utils._pytree.tree_map(change, self.state)
        if self.next_positions is not None:
            self.next_positions = change(self.next_positions)
