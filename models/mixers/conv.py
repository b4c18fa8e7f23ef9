"""The short causal convolution in front of a recurrence."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.init import Initializer, constant, normal
from models.mixers.placement import Placement
from ops import Layout, causal_conv1d


class ShortConv(nn.Module):
    """A causal convolution a channel, `[B, T, D] -> [B, T, D]`; weight `[D, W]`, the last tap on the current token.

    Its weights start as N(0, 0.01 / W), as RecurrentGemma's do.
    """

    def __init__(
        self,
        channels: int,
        conv_width: int,
        placement: Placement,
        *,
        bias: bool,
        activation: Literal["silu"] | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, conv_width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.core = placement.core(causal_conv1d, activation=activation)

    def initializers(self) -> dict[str, Initializer]:
        rules = {"weight": normal(math.sqrt(0.01 / self.weight.shape[1]))}
        return rules | {"bias": constant(0.0)} if self.bias is not None else rules

    def init_state(self, batch_size: int, device: torch.device | str) -> Tensor:
        channels, conv_width = self.weight.shape
        return torch.zeros(batch_size, conv_width - 1, channels, dtype=torch.float32, device=device)

    def forward(
        self, x: Tensor, layout: Layout | None, state: Tensor | None, output_final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.core(
            x, self.weight, self.bias, layout=layout, initial_state=state, output_final_state=output_final_state
        )
