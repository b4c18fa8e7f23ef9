"""One block: x += mixer(norm(x)); x += mlp(norm(x)). With post_norm: x += norm(mixer(x)); x += norm(mlp(x))."""

from typing import Any

from torch import Tensor, nn

from models.config import ModelConfig
from models.mixers import MIXERS
from models.mixers.placement import Placement
from models.mlp import MLP
from models.norm import RMSNorm
from ops import Layout


class Block(nn.Module):
    """`[B, T, D] -> [B, T, D]` and the mixer's state.

    Every mixer keeps the contract of `models/mixers`, so any may stand in any block.
    """

    def __init__(self, config: ModelConfig, kind: str, placement: Placement) -> None:
        super().__init__()
        self.kind = kind
        self.post_norm = kind in config.post_norm
        self.mixer_norm = RMSNorm(config.width, eps=config.norm_eps, one_plus_weight=config.norm_one_plus_weight)
        self.mixer = MIXERS[kind](config.mixer(kind), placement)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps, one_plus_weight=config.norm_one_plus_weight)
        self.mlp = MLP(config.mlp, config.width, output_scale=placement.output_scale)

    def forward(self, x: Tensor, layout: Layout | None, state: Any = None) -> tuple[Tensor, Any]:
        if self.post_norm:
            y, state = self.mixer(x, layout, state)
            x = x + self.mixer_norm(y)
            return x + self.mlp_norm(self.mlp(x)), state
        y, state = self.mixer(self.mixer_norm(x), layout, state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state

    def flops_per_token(self, sequence_length: int) -> int:
        return self.mixer.flops_per_token(sequence_length) + self.mlp.flops_per_token()
