"""The recurrent block of Griffin around the real-gated linear recurrent unit, RG-LRU.

De et al., 2024, "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models"
(arXiv 2402.19427), section 2.3 and equations 1 to 4.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.init import Initializer, Linear, constant, normal
from models.mixers.conv import ShortConv
from models.mixers.placement import Placement
from models.sharding import Cut, Sharding, cut_outputs
from ops import Layout, linear_scan

DECAY_SHARPNESS = 8.0
"""The constant c of equation 3: a_t = a^(c r_t)."""

MAX_SQRT_SLOPE = 1000.0
"""Bound on the derivative of sqrt(1 - a^2), which is infinite at a = 1; RecurrentGemma's value."""


@dataclass(frozen=True, kw_only=True)
class RGLRUConfig:
    """
    Attributes:
        width: channels R of the recurrence.
        gate_blocks: blocks of the block-diagonal gate matrices; R is a multiple of it.
        conv_width: taps of the causal convolution before the recurrence.
        decay_init: `recurrentgemma` draws a^2 uniformly between 0.9^2 and 0.999^2, `paper` draws a^c between 0.9 and
            0.999 (section 2.4), which remembers eight times longer.
    """

    width: int
    gate_blocks: int
    conv_width: int = 4
    decay_init: Literal["recurrentgemma", "paper"] = "recurrentgemma"

    def __post_init__(self) -> None:
        for key in ("gate_blocks", "conv_width"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; must be at least 1")
        if self.width < 1 or self.width % self.gate_blocks:
            raise ValueError(
                f"width: {self.width}; must be a positive multiple of gate_blocks ({self.gate_blocks}): "
                f"choose e.g. width {max(1, round(self.width / self.gate_blocks)) * self.gate_blocks}"
            )

    def num_params(self, width: int) -> int:
        projections = 3 * width * self.width + 2 * self.width + width
        gates = 2 * (self.width * self.width // self.gate_blocks + self.width)
        return projections + gates + self.width * (self.conv_width + 1) + self.width


class BoundedSqrt(torch.autograd.Function):
    """sqrt(x) whose derivative is bounded by MAX_SQRT_SLOPE."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = torch.sqrt(x)
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad / (2.0 * root).clamp_min(1.0 / MAX_SQRT_SLOPE)


class BlockDiagonalLinear(nn.Module):
    """`[B, T, R] -> [B, T, R]` through `gate_blocks` dense blocks; weight `[H, R/H, R/H]` as (block, in, out)."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.block_width = width // num_blocks
        self.weight = nn.Parameter(torch.empty(num_blocks, self.block_width, self.block_width))
        self.bias = nn.Parameter(torch.empty(num_blocks, self.block_width))

    def initializers(self) -> dict[str, Initializer]:
        return {"weight": normal(self.block_width**-0.5), "bias": constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, self.block_width))  # [B, T, H, R/H]
        return (torch.einsum("bthi,hio->btho", blocks, self.weight) + self.bias).flatten(-2)


class RGLRU(nn.Module):
    """out_proj(gelu(gate_proj(x)) * RG-LRU(conv(x_proj(x))))."""

    config_class: ClassVar[type] = RGLRUConfig

    def __init__(self, config: RGLRUConfig, placement: Placement) -> None:
        super().__init__()
        self.config = config
        self.x_proj = Linear(placement.width, config.width, bias=True)
        self.gate_proj = Linear(placement.width, config.width, bias=True)
        self.conv = ShortConv(config.width, config.conv_width, placement, bias=True)
        self.input_gate = BlockDiagonalLinear(config.width, config.gate_blocks)
        self.recurrence_gate = BlockDiagonalLinear(config.width, config.gate_blocks)
        self.decay_param = nn.Parameter(torch.empty(config.width))
        self.core = placement.core(linear_scan)
        self.out_proj = Linear(config.width, placement.width, bias=True, variance_scale=placement.output_scale)

    def initializers(self) -> dict[str, Initializer]:
        return {"decay_param": self._init_decay}

    def _init_decay(self, tensor: Tensor, generator: torch.Generator) -> None:
        power = 2.0 if self.config.decay_init == "recurrentgemma" else DECAY_SHARPNESS
        low, high = (0.9**2, 0.999**2) if power == 2.0 else (0.9, 0.999)
        rate = -tensor.uniform_(low, high, generator=generator).log() / power  # softplus(decay_param) = -log a
        tensor.copy_(rate.expm1().log())

    def forward(
        self, x: Tensor, layout: Layout | None, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        conv_state, scan_state = state if state is not None else (None, None)
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        h, conv_state = self.conv(self.x_proj(x), layout, conv_state, state is not None)
        inputs, log_decay = self.gated(h, layout)
        h, scan_state = self.core(
            inputs, log_decay, layout=layout, initial_state=scan_state, output_final_state=state is not None
        )
        y = self.out_proj(gate * h.to(gate.dtype))
        return y, None if state is None else (conv_state, scan_state)

    def gated(self, h: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """The recurrence's input and log decay, `[B, T, R]` each and at least fp32 (equations 1 to 4).

        The input of a document's first token is not scaled by sqrt(1 - a^2): nothing is remembered beside it.
        """
        precise = torch.promote_types(h.dtype, torch.float32)
        decay_gate = torch.sigmoid(self.recurrence_gate(h).to(precise))
        log_decay = -DECAY_SHARPNESS * decay_gate * F.softplus(self.decay_param.to(precise))
        scale = BoundedSqrt.apply(-torch.expm1(2.0 * log_decay))
        if layout is not None:
            scale = scale.masked_fill(layout.starts.unsqueeze(-1), 1.0)
        return torch.sigmoid(self.input_gate(h).to(precise)) * h.to(precise) * scale, log_decay

    def sharding(self) -> Sharding:
        blocks = self.config.gate_blocks
        parts = ("x_proj", "gate_proj", "conv", "input_gate", "recurrence_gate")
        own = {"decay_param": Cut(0, (blocks,)), "out_proj.weight": Cut(1, (blocks,))}
        return Sharding(cuts=cut_outputs(self, parts, blocks) | own, rows=("out_proj",))

    def init_state(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        state = torch.zeros(batch_size, self.decay_param.shape[0], dtype=torch.float32, device=device)
        return self.conv.init_state(batch_size, device), state

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, gate blocks, convolution and the recurrence's own multiply-add."""
        width, channels = self.x_proj.in_features, self.config.width
        gates = 2 * channels * channels // self.config.gate_blocks
        return 2 * (3 * width * channels + gates + self.config.conv_width * channels + channels)
