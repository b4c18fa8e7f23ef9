"""What a model is worth without its memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from models.lm import LM
from models.mixers.attention import AttentionCore
from ops import Layout


class Forgetful(nn.Module):
    """A recurrence or convolution whose state is zeroed before every token: each token is a document of its own."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, *args: Any) -> Any:
        return self.core(*(Layout(torch.zeros_like(a.positions)) if isinstance(a, Layout) else a for a in args))


@contextmanager
def without_recurrent_state(model: LM) -> Iterator[None]:
    """Inside, every recurrence and every short convolution of `model` forgets all before the current token.

    Attention, gates and scales are untouched, so what is lost is the state alone.
    """
    holders = [m for m in model.modules() if hasattr(m, "core") and not isinstance(m.core, AttentionCore | Forgetful)]
    for module in holders:
        module.core = Forgetful(module.core)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in holders:
            module.core = module.core.core  # type: ignore[union-attr]
