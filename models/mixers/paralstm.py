"""The recurrent block of ParaRNN around its diagonal LSTM.

Danieli et al., 2025, "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models"
(arXiv 2510.21450), equation 3.1 and appendix C.1; projections and gate stand as in Mamba-2, whose block it borrows.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.init import Initializer, Linear, constant
from models.mixers.conv import ShortConv
from models.mixers.placement import Placement
from models.norm import RMSNorm
from models.sharding import Cut, Sharding, cut_outputs
from ops import Layout, diagonal_lstm
from ops.diagonal_lstm import Statistics

CELL_PRODUCTS = 8
"""Multiplications a channel and token in the recurrence: 3 recurrent, 2 peephole, 2 of the cell, 1 of the output."""


@dataclass(frozen=True, kw_only=True)
class ParaLSTMConfig:
    """
    Attributes:
        width: channels R of the recurrence.
        heads: blocks of the block-diagonal input matrix B; R is a multiple of it.
        conv_width, conv_activation: the causal convolution before the cell.
        input_projection: a map from the stream to the R channels before the convolution; without one R is the stream's
            width.
        output_gate: gate the norm after the cell by silu of another projection of the stream.
        weight_limit: largest magnitude of recurrent and peephole weights, which is the norm of their diagonal matrices;
            0.5 published for language models, 0.9 for synthetic tasks, null (none) for parity.
        forget_bias: initial bias of the forget gate at the first and at the last channel, linear between them; 0 and 0
            in the paper, 0 and -1 in the authors' library; the larger, the longer the memory.
        residual_scale: a learnable factor on what the mixer adds to the stream. Norms ignore the stream's scale, so
            that it says as much as one on the stream itself.
        norm_eps: of the norm after the cell.
    """

    width: int
    heads: int = 4
    conv_width: int = 4
    conv_activation: Literal["silu"] | None = "silu"
    input_projection: bool = True
    output_gate: bool = True
    weight_limit: float | None = 0.5
    forget_bias: tuple[float, float] = (0.0, 0.0)
    residual_scale: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for key in ("heads", "conv_width"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; must be at least 1")
        if self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"width: {self.width}; must be a positive multiple of heads ({self.heads}): "
                f"choose e.g. width {max(1, round(self.width / self.heads)) * self.heads}"
            )
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps: {self.norm_eps}; must be positive")
        if self.weight_limit is not None and self.weight_limit <= 0:
            raise ValueError(f"weight_limit: {self.weight_limit}; must be positive, or null for none")

    def check_width(self, width: int) -> None:
        """Raises ValueError where the R channels cannot stand in a model of `width`."""
        if not self.input_projection and self.width != width:
            raise ValueError(
                f"width: {self.width}; must be the model's width ({width}) where input_projection is false: "
                f"set it to {width}, or input_projection to true"
            )

    def num_params(self, width: int) -> int:
        self.check_width(width)
        projections = (1 + self.input_projection + self.output_gate) * width * self.width
        inputs = 3 * self.width * self.width // self.heads + 3 * self.width
        cell = (3 + 2) * self.width
        return projections + self.width * (self.conv_width + 1) + inputs + cell + self.width + self.residual_scale


class Bounded(torch.autograd.Function):
    """A weight clipped to [-limit, limit] in the forward pass, its gradient passed on as it is.

    Clipping after every optimizer step would need the optimizer, which may hold copies of the weights. Here the
    recurrence never sees more than the limit; a weight beyond it still gets the gradient at the limit, so that it can
    return, where a clamp's own derivative of zero would hold it there for good. Dropping the gradient only where it
    points further out is no way: that depends on its sign, so that the parts of a batch would not add up to the whole.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, limit: float) -> Tensor:
        return weight.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class InputConv(ShortConv):
    """Taps start uniform within 1 / sqrt(W), torch's rule for convolutions, which keeps the input's scale."""

    def initializers(self) -> dict[str, Initializer]:
        return super().initializers() | {"weight": uniform(self.weight.shape[1] ** -0.5)}


class InputMatrix(nn.Module):
    """B and its bias: `[B, T, R]` -> pre-activations `[B, T, 3, R]` in the order forget, output, candidate.

    Weight `[H, R/H, 3, R/H]` as (head, in, gate, out), Kaiming-uniform; bias `[3, R]`.
    """

    def __init__(self, config: ParaLSTMConfig) -> None:
        super().__init__()
        self.head_dim = config.width // config.heads
        self.forget_bias = config.forget_bias
        self.weight = nn.Parameter(torch.empty(config.heads, self.head_dim, 3, self.head_dim))
        self.bias = nn.Parameter(torch.empty(3, config.width))

    def initializers(self) -> dict[str, Initializer]:
        return {"weight": uniform(math.sqrt(6 / self.head_dim)), "bias": self._init_bias}

    def _init_bias(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.zero_()
        tensor[0] = torch.linspace(*self.forget_bias, tensor.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, self.head_dim))  # [B, T, H, R/H]
        return torch.einsum("bthi,higo->btgho", heads, self.weight).flatten(-2) + self.bias


class ParaLSTM(nn.Module):
    """residual_scale * out_proj(norm(LSTM(input_matrix(conv(x_proj(x))))) * silu(gate_proj(x)))."""

    config_class: ClassVar[type] = ParaLSTMConfig

    def __init__(self, config: ParaLSTMConfig, placement: Placement) -> None:
        super().__init__()
        width, channels = placement.width, config.width
        config.check_width(width)
        self.config = config
        self.x_proj = Linear(width, channels, bias=False) if config.input_projection else None
        self.gate_proj = Linear(width, channels, bias=False) if config.output_gate else None
        self.conv = InputConv(channels, config.conv_width, placement, bias=True, activation=config.conv_activation)
        self.input_matrix = InputMatrix(config)
        self.recurrent = nn.Parameter(torch.empty(3, channels))
        self.peephole = nn.Parameter(torch.empty(2, channels))
        self.statistics = Statistics()
        self.core = placement.core(diagonal_lstm, statistics=self.statistics)
        self.norm = RMSNorm(channels, eps=config.norm_eps, one_plus_weight=False)
        self.out_proj = Linear(channels, width, bias=False, variance_scale=placement.output_scale)
        self.residual_scale = nn.Parameter(torch.empty(1)) if config.residual_scale else None

    def initializers(self) -> dict[str, Initializer]:
        rules: dict[str, Initializer] = {"recurrent": xavier_diagonal, "peephole": xavier_diagonal}
        return rules | {"residual_scale": constant(1.0)} if self.residual_scale is not None else rules

    def forward(
        self, x: Tensor, layout: Layout | None, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        conv_state, cell_state = state if state is not None else (None, None)
        gate = self.gate_proj(x) if self.gate_proj is not None else None
        h = self.x_proj(x) if self.x_proj is not None else x
        h, conv_state = self.conv(h, layout, conv_state, state is not None)
        h, cell_state = self.core(
            self.input_matrix(h),
            self.bounded(self.recurrent),
            self.bounded(self.peephole),
            layout=layout,
            initial_state=cell_state,
            output_final_state=state is not None,
        )
        y = self.out_proj(self.norm(h, gate))
        if self.residual_scale is not None:
            y = y * self.residual_scale.to(y.dtype)
        return y, None if state is None else (conv_state, cell_state)

    def sharding(self) -> Sharding:
        heads = self.config.heads
        cuts = cut_outputs(self, ("x_proj", "gate_proj", "conv", "norm"), heads)
        cuts |= {"input_matrix.weight": Cut(0, (heads,)), "out_proj.weight": Cut(1, (heads,))}
        cuts |= dict.fromkeys(("input_matrix.bias", "recurrent", "peephole"), Cut(1, (heads,)))
        obstacle = None
        if self.x_proj is None:
            obstacle = "input_projection is false, so that no map hands each rank its channels; set it to true"
        return Sharding(cuts=cuts, rows=("out_proj",), spanning=("norm",), obstacle=obstacle)

    def metrics(self) -> dict[str, Tensor]:
        """How the last call's recurrence was solved: figures of `ops.diagonal_lstm.Statistics`, on its device."""
        figures = self.statistics.figures()
        return {name: figures[name] for name in ("corrections", "residual", "sequential_channels") if name in figures}

    def bounded(self, weight: Tensor) -> Tensor:
        """The weight that the recurrence sees."""
        return weight if self.config.weight_limit is None else Bounded.apply(weight, self.config.weight_limit)

    def init_state(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        state = torch.zeros(batch_size, 2, self.recurrent.shape[1], dtype=torch.float32, device=device)
        return self.conv.init_state(batch_size, device), state

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, input matrix, convolution and the products of the recurrence."""
        config, width = self.config, self.out_proj.out_features
        projections = (1 + config.input_projection + config.output_gate) * width * config.width
        inputs = 3 * config.width * config.width // config.heads
        return 2 * (projections + inputs + (config.conv_width + CELL_PRODUCTS) * config.width)


def uniform(bound: float) -> Initializer:
    """Uniform between -bound and bound."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    return fill


def xavier_diagonal(tensor: Tensor, generator: torch.Generator) -> None:
    """N(0, 1 / R) for rows `[..., R]` that are the diagonals of R x R matrices: Xavier-Gaussian of equal fans."""
    tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
