"""Activation checkpointing: blocks that keep only their input for the backward pass, and run once more in it.

Applied to whole blocks from outside, to compiled ones as they are. What a block exchanges with other ranks is exchanged
again, in the same order on all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.block import Block
from models.lm import LM
from ops import Layout
from parallel.config import ParallelConfig
from parallel.traffic import running_in, running_layer


def checkpointed_blocks(kinds: tuple[str, ...], parallel: ParallelConfig) -> frozenset[int]:
    """Which blocks of a model with these mixers are checkpointed.

    Raises:
        ValueError: no block has a mixer that the configuration names.
    """
    missing = [kind for kind in parallel.checkpointed_mixers if kind not in kinds]
    if missing:
        raise ValueError(
            f"parallel.checkpointed_mixers: {missing}; must be mixers of model.layers, which has "
            f"{', '.join(dict.fromkeys(kinds))}; correct them"
        )
    if parallel.activation_checkpointing == "full":
        return frozenset(range(len(kinds)))
    if parallel.checkpointed_every is not None:
        return frozenset(range(0, len(kinds), parallel.checkpointed_every))
    return frozenset(i for i, kind in enumerate(kinds) if kind in parallel.checkpointed_mixers)


def checkpoint_blocks(model: LM, parallel: ParallelConfig) -> None:
    """Replaces, in place, how these blocks of `model` run; their parameters and names stay."""
    for i in checkpointed_blocks(model.config.layers, parallel):
        if isinstance(model.blocks[i], Block):  # not one of another pipeline stage
            model.blocks[i].forward = partial(_run, model.blocks[i].forward)


def _run(forward: Callable[..., Any], x: Tensor, layout: Layout | None, state: Any = None) -> tuple[Tensor, Any]:
    """A block's forward pass, which the backward pass repeats."""
    if not torch.is_grad_enabled() or state is not None:
        return forward(x, layout, state)
    layer = running_layer()

    def run(x: Tensor) -> Tensor:
        with running_in(layer):
            return forward(x, layout)[0]

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False), None
