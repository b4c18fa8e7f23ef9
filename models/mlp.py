"""The gated MLP of a block."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.init import Linear
from models.sharding import Cut, Sharding, cut_outputs


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """`down(activation(gate(x)) * up(x))` of `width` hidden units (Shazeer, 2020)."""

    width: int
    activation: Literal["gelu_tanh", "silu"] = "gelu_tanh"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: {self.width}; at least 1 hidden unit is needed")

    def num_params(self, width: int) -> int:
        return 3 * width * self.width + self.bias * (2 * self.width + width)


class MLP(nn.Module):
    """`[B, T, D] -> [B, T, D]`."""

    def __init__(self, config: MLPConfig, width: int, *, output_scale: float) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(width, config.width, bias=config.bias)
        self.up = Linear(width, config.width, bias=config.bias)
        self.down = Linear(config.width, width, bias=config.bias, variance_scale=output_scale)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        gate = F.silu(gate) if self.config.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down(gate * self.up(x))

    def sharding(self) -> Sharding:
        cuts = cut_outputs(self, ("gate", "up"), self.gate.out_features)
        return Sharding(cuts=cuts | {"down.weight": Cut(1, (self.down.in_features,))}, rows=("down",))

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token, two per multiply-add."""
        return 2 * 3 * self.gate.in_features * self.gate.out_features
