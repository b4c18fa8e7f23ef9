"""What stages send, from one block of each kind: sums of `traffic_of`, fast enough for thousands of arrangements."""

from dataclasses import replace
from functools import cache

import torch

from models.config import ModelConfig
from models.lm import LM
from parallel.plan.resent import resent
from parallel.traffic import Volume
from parallel.volume import Split, traffic_of

Sums = dict[tuple[str, str], Volume]
"""By axis and operation."""


class Passing:
    """
    Args:
        config: the model, whose blocks of a kind send the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.layers = config.layers
        self._kinds = tuple(dict.fromkeys(config.layers))
        with torch.device("meta"):
            self._model = LM(replace(config, layers=self._kinds, impl=None))
        self._of_layers, self._again = cache(self._sent), cache(self._resent)

    def _sent(self, split: Split) -> dict[str, Sums]:
        """A microbatch's, by kind, and of the embedding and the head."""
        return self._by_kind(traffic_of(self._model, split))

    def _resent(self, split: Split) -> dict[str, Sums]:
        return self._by_kind(resent(self._model, split, frozenset(range(len(self._kinds)))))

    def _by_kind(self, found: dict) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}
        for key, volume in found.items():
            kind = self._kinds[int(key.layer.split(".")[1])] if key.layer.startswith("blocks") else key.layer
            of_kind = sums.setdefault(kind, {})
            place = (key.axis, key.operation)
            of_kind[place] = of_kind.get(place, Volume(0, 0)).plus(volume)
        return sums

    def sums(self, split: Split, bounds: tuple[int, ...], stage: int, checkpointed: frozenset[int]) -> Sums:
        """Of a microbatch in `stage` of stages with these bounds."""
        total: Sums = {}
        sent, last = self._of_layers(split), len(bounds) - 2
        parts = [sent.get(self.layers[i], {}) for i in range(*bounds[stage : stage + 2])]
        parts += [sent.get("embed", {})] * (stage == 0) + [sent.get("head", {})] * (stage == last)
        if checkpointed:
            again = self._again(split)
            parts += [again.get(self.layers[i], {}) for i in range(*bounds[stage : stage + 2]) if i in checkpointed]
        stream = split.tokens * self._model.config.width * split.wide // (split.tensor if split.sharded_norms else 1)
        if stage < last:
            parts.append({("pipeline", "send"): Volume(2, stream + 8 * split.tokens)})
        if stage > 0:
            parts.append({("pipeline", "send"): Volume(1, stream)})
        for part in parts:
            for place, volume in part.items():
                total[place] = total.get(place, Volume(0, 0)).plus(volume)
        return total
