"""Where documents lie in a batch of packed rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Layout:
    """The document structure of a microbatch, and what ops derive from it.

    positions: int64 [B, T], the index of each token inside its document. 0 starts a document; a row whose first
    position is p > 0 continues a document whose p earlier tokens are summed up in the state handed to the op.

    Build one per microbatch and hand it to every layer: masks are derived once, not once a layer.
    Raises ValueError for a wrong shape or dtype and, on CPU tensors only and not in compiled code (reading values would
    synchronise an accelerator and end a graph; under `ops.checked_values` ops do it all the same), for positions that
    are negative or neither rise by one nor restart at 0 inside a row.
    """

    def __init__(self, positions: Tensor) -> None:
        if positions.dim() != 2 or 0 in positions.shape or positions.dtype != torch.int64:
            raise ValueError(
                f"positions: {positions.dtype} {list(positions.shape)}; must be int64 [B, T] with B, T >= 1"
            )
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            check_positions(positions)
        self.positions = positions
        self._derived: dict[tuple[Any, ...], Any] = {}

    @property
    def starts(self) -> Tensor:
        """bool [B, T]: the first token of each document that starts in the slice."""
        return self.derive(_starts)

    def derive(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(positions, *args)`, computed on the first call and kept for the later ones.

        Compiled code computes it where it is used: a graph that knew what is kept would be another one for each layer.
        """
        if torch.compiler.is_compiling():
            return function(self.positions, *args)
        key = (function, *args)
        if key not in self._derived:
            self._derived[key] = function(self.positions, *args)
        return self._derived[key]


def _starts(positions: Tensor) -> Tensor:
    return positions == 0


def check_positions(positions: Tensor) -> None:
    """Raise ValueError unless positions [B, T] are >= 0 and rise by one or restart at 0 inside each row."""
    if positions.min() < 0:
        raise ValueError(f"positions: {int(positions.min())} is negative; must be the index of a token in its document")
    before, after = positions[:, :-1], positions[:, 1:]
    wrong = (after != 0) & (after != before + 1)
    if wrong.any():
        row, t = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"positions: {int(before[row, t])} is followed by {int(after[row, t])} in row {row} at t = {t + 1}; "
            f"must rise by one or restart at 0"
        )
