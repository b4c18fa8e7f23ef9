"""Whole tensors of the training state under their canonical names, however ZeRO cuts them up."""

from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from models.checkpoint import Kind
from parallel.collectives import all_gather
from parallel.partition import Partition


class TrainingState:
    """fp32 weights, both Adam moments and the number of updates.

    The moments exist from the start, as the zeros that AdamW would create at its first update: memory is known early,
    and a state can be saved and loaded before any step.

    Args:
        module: the model; `parameters` of it are named as it names them, a tied one once.
        adamw: the optimizer that updates it, over the tensors that ZeRO made of the parameters.
        zero: DeepSpeed's optimizer; `adamw` itself without ZeRO.
        partition: how the model is cut over tensor ranks; None where it is not.
    """

    def __init__(
        self, module: nn.Module, adamw: torch.optim.AdamW, zero: Any, partition: Partition | None = None
    ) -> None:
        self.parameters = dict(module.named_parameters())
        self._partition = partition
        self._adamw = adamw
        self._partitioned = zero is not adamw
        for tensor in self._updated_tensors():
            adamw.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        if self._partitioned:
            zero._lazy_init_hp_params_optimizer_state()

    @property
    def num_updates(self) -> int:
        """Updates that AdamW has made; its bias correction depends on it."""
        counts = {int(self._adamw.state[tensor]["step"]) for tensor in self._updated_tensors()}
        assert len(counts) == 1, f"parameter groups were updated {sorted(counts)} times"
        return counts.pop()

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        for tensor in self._updated_tensors():
            self._adamw.state[tensor]["step"].fill_(count)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole parameters."""
        if self._partition is not None:
            return self._partition.shapes
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def gather(self, name: str, kind: Kind) -> Tensor:
        """The whole tensor, in the whole parameter's shape. Collective; not to be written to."""
        part = self._gather_replicas(name, kind)
        if self._partition is None or name not in self._partition.cuts:
            return part
        return self._partition.whole(name, all_gather(part, self._partition.axis).unbind(0))

    def _gather_replicas(self, name: str, kind: Kind) -> Tensor:
        """What ZeRO cut up over the ranks that hold the same part."""
        parameter = self.parameters[name]
        if not self._partitioned:
            return parameter.detach() if kind == "weight" else self._adamw.state[parameter][kind]
        if kind == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    @torch.no_grad()
    def assign(self, name: str, kind: Kind, value: Tensor) -> None:
        """Takes over what this rank holds of the whole tensor `value`. To be called on every rank."""
        parameter = self.parameters[name]
        if self._partition is not None:
            value = self._partition.part(name, value)
        if kind == "weight":
            parameter.copy_(value)
            if self._partitioned:
                safe_set_full_fp32_param(parameter, value)
        elif self._partitioned:
            safe_set_full_optimizer_state(parameter, value, kind)
        else:
            self._adamw.state[parameter][kind].copy_(value)

    def _updated_tensors(self) -> list[Tensor]:
        return [tensor for group in self._adamw.param_groups for tensor in group["params"]]
