"""What a model is worth without its memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from models.lm import LM
from models.mixers.placement import OpCore
from ops import Layout, attention, local_attention


class Forgetful(nn.Module):
    """A recurrence or convolution whose state is zeroed before every token: each token is a document of its own."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, *tensors: Any, layout: Layout, **state: Any) -> Any:
        return self.core(*tensors, layout=Layout(torch.zeros_like(layout.positions)), **state)


@contextmanager
def without_recurrent_state(model: LM) -> Iterator[None]:
    """Inside, every recurrence and every short convolution of `model` forgets all before the current token.

    Attention, gates and scales are untouched, so what is lost is the state alone.
    """
    holders = [m for m in model.modules() if isinstance(getattr(m, "core", None), OpCore) and not _attends(m.core)]
    for module in holders:
        module.core = Forgetful(module.core)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in holders:
            module.core = module.core.core  # type: ignore[union-attr]


def _attends(core: Any) -> bool:
    return core.op in (attention, local_attention)
