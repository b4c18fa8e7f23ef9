"""Whole tensors of the training state under their canonical names, however ZeRO cuts them up."""

from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import Kind
from parallel.collectives import all_gather
from parallel.holding import holding
from parallel.partition import Partition
from parallel.scatter import whole_shape


class TrainingState:
    """fp32 weights, both Adam moments and the number of updates.

    The moments exist from the start, as the zeros that AdamW would create at its first update: memory is known early,
    and a state can be saved and loaded before any step.

    Args:
        module: the model; `parameters` of it are named as it names them, a tied one once.
        adamw: the optimizer that updates it, over the tensors that ZeRO made of the parameters.
        zero: DeepSpeed's optimizer; `adamw` itself without ZeRO.
        partition: how the model is cut over tensor ranks; None where it is not.
        owned_before: parameters of `module` that an earlier pipeline stage holds too, and saves.
    """

    def __init__(
        self,
        module: nn.Module,
        adamw: torch.optim.AdamW,
        zero: Any,
        partition: Partition | None = None,
        owned_before: frozenset[str] = frozenset(),
    ) -> None:
        self.parameters = dict(module.named_parameters())
        self._owned_before = owned_before
        self._partition = partition
        self._adamw = adamw
        self._holding = holding(adamw, zero)
        for tensor in self._holding.updated:
            adamw.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        self._holding.ready()

    @property
    def num_updates(self) -> int:
        """Updates that AdamW has made; its bias correction depends on it."""
        counts = {int(self._adamw.state[tensor]["step"]) for tensor in self._holding.updated}
        assert len(counts) == 1, f"parameter groups were updated {sorted(counts)} times"
        return counts.pop()

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        for tensor in self._holding.updated:
            self._adamw.state[tensor]["step"].fill_(count)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that this rank's pipeline stage holds, by their names in the whole model."""
        return tuple(self.parameters)

    @property
    def owned(self) -> tuple[str, ...]:
        """Those of `names` that this stage saves: one that several stages hold is the first one's."""
        return tuple(name for name in self.parameters if name not in self._owned_before)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole parameters of the whole model."""
        if self._partition is not None:
            return self._partition.shapes
        return {name: whole_shape(parameter) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def gather(self, name: str, kind: Kind) -> Tensor:
        """The whole tensor of one of `names`, in the whole parameter's shape; not to be written to. Collective over the
        axis `stage`."""
        part = self._holding.gather(self.parameters[name], kind)
        if self._partition is None or name not in self._partition.cuts:
            return part
        return self._partition.whole(name, all_gather(part, self._partition.axis).unbind(0))

    @torch.no_grad()
    def assign(self, name: str, kind: Kind, value: Tensor) -> None:
        """Takes over what this rank holds of the whole tensor `value`. To be called on every rank."""
        if self._partition is not None:
            value = self._partition.part(name, value)
        self._holding.assign(self.parameters[name], kind, value)
