"""Ranks that speak through torchrun's store alone: it needs no GPU, and no network but the one that started them."""

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Meeting:
    """All ranks of a job.

    Attributes:
        store: with names for this purpose alone.
        rank, size: this rank, and how many there are.
        timeout: for any rank to leave its word.
    """

    store: dist.Store
    rank: int
    size: int
    timeout: timedelta

    def gather(self, name: str, own: Any) -> list[Any] | None:
        """Every rank's word, small and of JSON, on the first rank, None on the others. Collective.

        The word of a rank that does not leave it in time is None.
        """
        self.store.set(f"{name}_{self.rank}", json.dumps(own))
        if self.rank != 0:
            return None
        words: list[Any] = []
        timeout = self.timeout
        for other in range(self.size):
            try:
                self.store.wait([f"{name}_{other}"], timeout)
            except RuntimeError:
                words.append(None)
                timeout = timedelta(seconds=1)  # the others have had theirs
            else:
                words.append(json.loads(self.store.get(f"{name}_{other}")))
        return words

    def hear(self, name: str, value: Any) -> Any:
        """The first rank's `value`, of JSON, on every rank; what others pass is not looked at. Collective."""
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
        self.store.wait([name], 2 * self.timeout)
        return json.loads(self.store.get(name))
