"""Which parameters decay."""

import fnmatch
from typing import Any

from torch import nn

NO_DECAY = (
    "*.bias",  # offsets: shrinking them buys no simplicity
    "*norm.weight",  # scales of normalised values
    "*.lower_bounds",  # HGRN2's floors of the decays: at 0 they are evenly spaced, which is a start, not a prior
    "*.recurrent",  # ParaRNN's diagonals, which couple a channel to its own past: bounded already, not by decay
    "*.peephole",  # the same for its cell
    "*.residual_scale",  # a gain on a whole block: decay would switch the block off
    "*.A_log",  # Gated DeltaNet's rates of decay and, below, its time steps, as its authors do
    "*.dt_bias",
    "*.decay_param",  # RG-LRU's memory length: decaying it towards 0 is a drift, not a prior
)
"""Patterns over parameter names that weight decay spares. Everything else decays, the embedding included: tied to the
head it is a weight matrix, and its logits are capped."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: decayed and spared, each in the order of `named_parameters`.

    Raises:
        ValueError: a parameter of fewer than two dimensions matches no pattern: say in NO_DECAY what it is.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in NO_DECAY):
            spared.append(parameter)
        elif len(getattr(parameter, "ds_shape", parameter.shape)) < 2:  # ZeRO 3 leaves scattered ones without entries
            raise ValueError(
                f"{name}: a vector that no pattern of training.optimizer.NO_DECAY names; add one or a reason"
            )
        else:
            decayed.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
