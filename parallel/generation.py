"""Text from the model while it is trained, on all ranks together: whole rows and single tokens through the cut model.

All ranks make the same tokens, as parts of layers and, under ZeRO 3, weights come together from all. What slices of a
row exchange in training is left out: every rank along the sequence axis has the whole row here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.lm import LM, State
from parallel.grid import Grid
from parallel.regions import Region
from parallel.scatter import gathered
from parallel.sequence import SequenceCore


class GeneratingModel:
    """What generation needs of an LM. Its calls are collective."""

    def __init__(self, model: LM, grid: Grid) -> None:
        self._model, self._grid = model, grid
        self.config, self.embed, self.hidden = model.config, model.embed, model.hidden

    def init_state(self, batch_size: int, device: torch.device | str = "cpu") -> State:
        states = []
        for block in self._model.blocks:
            with gathered(block.mixer.parameters()):  # sizes of states are those of parameters
                states.append(block.mixer.init_state(batch_size, device))
        return tuple(states)

    def head(self, x: Tensor) -> Tensor:
        """The first rank's logits: ranks whose rounding differs must not go on with different tokens."""
        logits = self._model.head(x)
        if self._grid.world_size > 1:
            logits = logits.contiguous()
            dist.broadcast(logits, src=0)
        return logits


@contextmanager
def generating(model: LM, grid: Grid) -> Iterator[Any]:
    """Inside `with`, the model in a form that `eval.generate` takes for an LM. To be entered on all ranks."""
    cores = [module for module in model.modules() if isinstance(module, SequenceCore)]
    regions = {id(region): region for m in model.modules() if isinstance(region := getattr(m, "region", None), Region)}
    sliced = {key: region.sliced for key, region in regions.items()}
    training = model.training
    model.eval()
    try:
        for core in cores:
            core.whole_rows = True
        for region in regions.values():
            region.sliced = False
        with torch.no_grad():
            yield GeneratingModel(model, grid)
    finally:
        model.train(training)
        for core in cores:
            core.whole_rows = False
        for key, region in regions.items():
            region.sliced = sliced[key]
