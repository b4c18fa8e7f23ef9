"""One block: x += mixer(norm(x)); x += mlp(norm(x))."""

from typing import Any

from torch import Tensor, nn

from models.config import ModelConfig
from models.mixers import MIXERS
from models.mlp import MLP
from models.norm import RMSNorm
from ops import Layout


class Block(nn.Module):
    """`[B, T, D] -> [B, T, D]` and the mixer's state.

    The two maps that write into the residual stream start with variance 2 / depth (Griffin, appendix).
    """

    def __init__(self, config: ModelConfig, kind: str, *, device_type: str = "cpu") -> None:
        super().__init__()
        output_scale = 2.0 / len(config.layers)
        self.kind = kind
        self.mixer_norm = RMSNorm(config.width, eps=config.norm_eps, one_plus_weight=config.norm_one_plus_weight)
        self.mixer = MIXERS[kind](
            config.mixer(kind), config.width, output_scale=output_scale, impl=config.impl, device_type=device_type
        )
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps, one_plus_weight=config.norm_one_plus_weight)
        self.mlp = MLP(config.mlp, config.width, output_scale=output_scale)

    def forward(self, x: Tensor, layout: Layout | None, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x), layout, state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state

    def flops_per_token(self, sequence_length: int) -> int:
        return self.mixer.flops_per_token(sequence_length) + self.mlp.flops_per_token()
