"""The token mixer of Gated DeltaNet: a memory that decays, unlearns and learns.

Yang et al., 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), section 3.4; negative
eigenvalues: Grazzi et al., 2024 (arXiv 2411.12537).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.init import Initializer, Linear, normal
from models.mixers.conv import ShortConv
from models.mixers.placement import Placement
from models.norm import RMSNorm
from models.sharding import Cut, Sharding, cut_outputs
from ops import Layout, gated_delta_rule

State = tuple[Tensor, ...]
"""The matrix states [B, HV, K, V], after the state of the convolution, [B, W - 1, 2 H K + HV V], where there is one."""

MAX_RATE = 16.0
"""Upper end of the initial rates exp(A_log); they are drawn uniformly from above 0."""

STEP_RANGE = (1e-3, 1e-1)
"""Of the initial steps softplus(dt_bias), drawn log-uniformly: Mamba2's."""

L2_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """
    Attributes:
        heads: query and key heads H.
        head_dim: K, features of a query or key.
        value_heads: HV, a multiple of H, each with its own values, decay and memory; H by default.
        expand_v: V / K.
        conv_width: taps of the causal convolution of queries, keys and values; null for none.
        conv_bias: whether it has a bias.
        output_gate: gate the norm of each head's output by silu of another projection of the stream.
        negative_eigenvalues: beta between 0 and 2 instead of 0 and 1: what is held under a key can change its sign.
        norm_eps: of the norm of each head's output.
    """

    heads: int
    head_dim: int
    value_heads: int | None = None
    expand_v: float = 2.0
    conv_width: int | None = 4
    conv_bias: bool = False
    output_gate: bool = True
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for key in ("heads", "head_dim", "conv_width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value}; must be at least 1")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps: {self.norm_eps}; must be positive")
        if self.conv_bias and self.conv_width is None:
            raise ValueError("conv_bias: true without a convolution; set conv_width, for example 4")
        if self.num_value_heads < 1 or self.num_value_heads % self.heads:
            raise ValueError(
                f"value_heads: {self.value_heads}; must be a positive multiple of heads ({self.heads}): "
                f"choose e.g. {max(1, round(self.num_value_heads / self.heads)) * self.heads}"
            )
        if self.value_dim < 1 or not math.isclose(self.expand_v * self.head_dim, self.value_dim, rel_tol=1e-6):
            raise ValueError(
                f"expand_v: {self.expand_v}; times head_dim ({self.head_dim}) must be a whole number of value "
                f"features: choose e.g. {max(1, self.value_dim) / self.head_dim}"
            )

    @property
    def num_value_heads(self) -> int:
        return self.heads if self.value_heads is None else self.value_heads

    @property
    def value_dim(self) -> int:
        """V."""
        return round(self.expand_v * self.head_dim)

    def num_params(self, width: int) -> int:
        keys, values = self.heads * self.head_dim, self.num_value_heads * self.value_dim
        projections = width * (2 * keys + (2 + self.output_gate) * values + 2 * self.num_value_heads)
        taps = 0 if self.conv_width is None else self.conv_width + self.conv_bias
        return projections + taps * (2 * keys + values) + 2 * self.num_value_heads + self.value_dim


class FusedConv(ShortConv):
    """The convolution of [q | k | v], each by heads. Its taps start with the variance 1 / 3W of torch's own Conv1d,
    which the published code keeps: values of RecurrentGemma's size would vanish beside the eps of the output norm."""

    def initializers(self) -> dict[str, Initializer]:
        return super().initializers() | {"weight": normal(math.sqrt(1 / (3 * self.weight.shape[1])))}


class GatedDeltaNet(nn.Module):
    """`[B, T, D] -> [B, T, D]` through HV matrix states of K x V."""

    config_class: ClassVar[type] = GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, placement: Placement) -> None:
        super().__init__()
        self.config = config
        width, value_heads = placement.width, config.num_value_heads
        keys, values = config.heads * config.head_dim, value_heads * config.value_dim
        self.q_proj = Linear(width, keys, bias=False)
        self.k_proj = Linear(width, keys, bias=False)
        self.v_proj = Linear(width, values, bias=False)
        self.conv = self._conv(2 * keys + values, placement)
        self.decay_proj = Linear(width, value_heads, bias=False)
        self.beta_proj = Linear(width, value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(value_heads))
        self.dt_bias = nn.Parameter(torch.empty(value_heads))
        self.core = placement.core(gated_delta_rule)
        self.gate_proj = Linear(width, values, bias=False) if config.output_gate else None
        self.norm = RMSNorm(config.value_dim, eps=config.norm_eps, one_plus_weight=False)
        self.o_proj = Linear(values, width, bias=False, variance_scale=placement.output_scale)

    def _conv(self, channels: int, placement: Placement) -> FusedConv | None:
        config = self.config
        if config.conv_width is None:
            return None
        return FusedConv(channels, config.conv_width, placement, bias=config.conv_bias, activation="silu")

    def initializers(self) -> dict[str, Initializer]:
        return {"A_log": _init_rate, "dt_bias": _init_step}

    def forward(self, x: Tensor, layout: Layout | None, state: State | None = None) -> tuple[Tensor, State | None]:
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        mixed, conv_state = self.convolved(mixed, layout, state)
        q, k, v = mixed.split([proj.out_features for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        q, k = (_unit(z.unflatten(-1, (-1, self.config.head_dim))) for z in (q, k))  # [B, T, H, K]
        v = v.unflatten(-1, (-1, self.config.value_dim))  # [B, T, HV, V]
        o, memory = self.core(
            q,
            k,
            v,
            *self.gated(x),
            layout=layout,
            initial_state=None if state is None else state[-1],
            output_final_state=state is not None,
        )
        o = self.norm(o, None if self.gate_proj is None else self.gate_proj(x).view_as(o))
        y = self.o_proj(o.flatten(-2))
        return y, None if state is None else (*conv_state, memory)

    def convolved(self, x: Tensor, layout: Layout | None, state: State | None) -> tuple[Tensor, State]:
        """silu(conv(x)), or silu(x) without a convolution, and what the next state begins with."""
        if self.conv is None:
            return F.silu(x), ()
        x, conv_state = self.conv(x, layout, None if state is None else state[0], state is not None)
        return x, (conv_state,)

    def gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay and beta, `[B, T, HV]` each and at least fp32: a log decay is small beside what bf16 resolves."""
        precise = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(self.decay_proj(x).to(precise) + self.dt_bias.to(precise))
        beta = torch.sigmoid(self.beta_proj(x).to(precise))
        return -self.A_log.to(precise).exp() * step, 2.0 * beta if self.config.negative_eigenvalues else beta

    def sharding(self) -> Sharding:
        heads, value_heads = self.config.heads, len(self.A_log)
        keys, values = self.q_proj.out_features, self.v_proj.out_features
        fused = Cut(0, (heads, heads, value_heads), sizes=(keys, keys, values))
        cuts = cut_outputs(self, ("q_proj", "k_proj"), heads)
        cuts |= cut_outputs(self, ("v_proj", "gate_proj", "decay_proj", "beta_proj"), value_heads)
        cuts |= dict.fromkeys(cut_outputs(self, ("conv",), heads), fused)
        cuts |= dict.fromkeys(("A_log", "dt_bias"), Cut(0, (value_heads,)))
        cuts |= {"o_proj.weight": Cut(1, (value_heads,))}
        return Sharding(cuts=cuts, rows=("o_proj",), partial=("norm.weight",))

    def init_state(self, batch_size: int, device: torch.device | str) -> State:
        shape = (batch_size, len(self.A_log), self.config.head_dim, self.config.value_dim)
        memory = torch.zeros(shape, dtype=torch.float32, device=device)
        return (memory,) if self.conv is None else (self.conv.init_state(batch_size, device), memory)

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, convolution, and for each state its decay, k^T S, the outer product and q^T S."""
        keys, values, heads = self.q_proj.out_features, self.v_proj.out_features, len(self.A_log)
        projections = self.q_proj.in_features * (2 * keys + (2 + self.config.output_gate) * values + 2 * heads)
        taps = 0 if self.conv is None else self.conv.weight.numel()
        return 2 * (projections + taps + 4 * values * self.config.head_dim)


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, at least in fp32: rounded to bf16 a key could be longer than 1."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _init_rate(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.copy_((MAX_RATE - tensor.uniform_(0, MAX_RATE, generator=generator)).log())  # in (0, 16]: no log of 0


def _init_step(tensor: Tensor, generator: torch.Generator) -> None:
    low, high = STEP_RANGE
    step = tensor.uniform_(math.log(low), math.log(high), generator=generator).exp()
    tensor.copy_(step.expm1().log())  # the inverse of softplus
