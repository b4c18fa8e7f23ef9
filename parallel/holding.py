"""How ZeRO's stages hold weights and moments: the tensors that AdamW updates, and whole tensors from and to them."""

from typing import Any, Protocol

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from models.checkpoint import Kind
from parallel.scatter import share_of


class Holding(Protocol):
    """Of the ranks along the axis `replicas`."""

    @property
    def updated(self) -> list[Tensor]:
        """The tensors that AdamW updates on this rank; its state is kept by them."""

    def ready(self) -> None:
        """AdamW's state of every tensor of `updated` exists."""

    def gather(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        """What the ranks together hold, in the parameter's shape. Collective; not to be written to."""

    def assign(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        """Takes over this rank's share of `value`, which has the parameter's shape. Called on every rank."""


class Whole:
    """ZeRO 0: every rank has all."""

    def __init__(self, adamw: torch.optim.AdamW) -> None:
        self._adamw = adamw

    @property
    def updated(self) -> list[Tensor]:
        return [tensor for group in self._adamw.param_groups for tensor in group["params"]]

    def ready(self) -> None:
        pass

    def gather(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        return parameter.detach() if kind == "weight" else self._adamw.state[parameter][kind]

    def assign(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        (parameter if kind == "weight" else self._adamw.state[parameter][kind]).copy_(value)


class Flat(Whole):
    """ZeRO 1 and 2: all weights on every rank; of master weights and moments a share, flat, perhaps off the device."""

    def __init__(self, adamw: torch.optim.AdamW, zero: Any) -> None:
        super().__init__(adamw)
        self._zero = zero

    def ready(self) -> None:
        self._zero._lazy_init_hp_params_optimizer_state()

    def gather(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        if kind == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def assign(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        if kind == "weight":
            parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)


class Scattered:
    """ZeRO 3: a share of everything; between steps AdamW's own groups are empty."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    @property
    def updated(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def ready(self) -> None:
        pass

    def gather(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        return self._zero.get_full_hp_param(parameter, None if kind == "weight" else kind)

    def assign(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        share = share_of(value, parameter)
        self._zero.set_local_hp_param(share, parameter, None if kind == "weight" else kind)
        if kind != "weight":
            return
        parameter.ds_tensor.copy_(share)  # type: ignore[attr-defined]  # a copy of its own where state is offloaded
        if parameter.numel():  # small ones stay whole between steps
            parameter.data.copy_(value)


def holding(adamw: torch.optim.AdamW, zero: Any) -> Holding:
    """Args:
    adamw: the optimizer that the run made.
    zero: DeepSpeed's, which wraps it; `adamw` itself without ZeRO.
    """
    if zero is adamw:
        return Whole(adamw)
    return Scattered(zero) if hasattr(zero, "fp32_partitioned_groups_flat") else Flat(adamw, zero)
