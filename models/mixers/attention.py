"""Softmax attention, over the whole document or a sliding window, with grouped keys and rotary angles."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.init import Linear
from models.mixers.placement import OpCore, Placement
from models.norm import RMSNorm
from models.sharding import Cut, Sharding, cut_outputs
from ops import Layout, attention, local_attention, rotary

KVState = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """
    Attributes:
        heads: query heads H.
        kv_heads: key and value heads G; H is a multiple of it (Ainslie et al., 2023). One is multi-query attention.
        head_dim: K, even.
        rotary_fraction: share of the head's features that are rotated (Su et al., 2021); 0 turns rotation off.
        rotary_theta: base of the rotation's wavelengths.
        qkv_bias, output_bias: whether the projections have biases.
        qk_norm: an RMS norm of queries and of keys before the rotation, over all features of all heads (`full`, as in
            OLMo) or over each head's (`head`, one weight for all heads, as in Qwen3), or `none`.
        qk_norm_eps: of these norms.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_fraction: float = 1.0
    rotary_theta: float = 10_000.0
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "full", "head"] = "none"
    qk_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for key in ("kv_heads", "head_dim", "rotary_theta", "qk_norm_eps"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}: {getattr(self, key)}; must be positive")
        if self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"heads: {self.heads}; must be a positive multiple of kv_heads ({self.kv_heads}): "
                f"choose e.g. {max(1, round(self.heads / self.kv_heads)) * self.kv_heads}"
            )
        if not 0.0 <= self.rotary_fraction <= 1.0 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction: {self.rotary_fraction}; must lie in 0 to 1 and leave an even number of the "
                f"{self.head_dim} features of a head to rotate"
            )
        if self.qk_norm not in ("none", "full", "head"):
            raise ValueError(f"qk_norm: {self.qk_norm!r}; must be none, full or head")

    @property
    def rotary_dim(self) -> int:
        return int(self.rotary_fraction * self.head_dim)

    def num_params(self, width: int) -> int:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = self.qkv_bias * (queries + 2 * keys) + self.output_bias * width
        norms = {"none": 0, "full": queries + keys, "head": 2 * self.head_dim}[self.qk_norm]
        return width * (2 * queries + 2 * keys) + biases + norms


@dataclass(frozen=True, kw_only=True)
class LocalAttentionConfig(AttentionConfig):
    """`window`: a query sees itself and the window - 1 tokens before it."""

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window: {self.window}; at least 1 token, the query itself, must be seen")


class Attention(nn.Module):
    """Causal attention inside each document; its state is the rotated keys and the values seen so far."""

    config_class: ClassVar[type] = AttentionConfig

    def __init__(self, config: AttentionConfig, placement: Placement) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(placement.width, queries, bias=config.qkv_bias)
        self.k_proj = Linear(placement.width, keys, bias=config.qkv_bias)
        self.v_proj = Linear(placement.width, keys, bias=config.qkv_bias)
        if config.qk_norm != "none":
            sizes = (queries, keys) if config.qk_norm == "full" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(size, eps=config.qk_norm_eps, one_plus_weight=False) for size in sizes)
        self.rotary_impl = placement.choice(rotary)
        self.core = self._core(placement)
        self.o_proj = Linear(queries, placement.width, bias=config.output_bias, variance_scale=placement.output_scale)

    def _core(self, placement: Placement) -> OpCore:
        return placement.core(attention)

    @property
    def window(self) -> int | None:
        return None

    def forward(self, x: Tensor, layout: Layout | None, state: KVState | None = None) -> tuple[Tensor, KVState | None]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (z.unflatten(-1, (-1, self.config.head_dim)) for z in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rotary_dim:
            positions = self._angles(x, layout, state)
            turn = partial(
                rotary, theta=self.config.rotary_theta, rotary_dim=self.config.rotary_dim, impl=self.rotary_impl
            )
            q, k = turn(q, positions), turn(k, positions)
        # [B, T, H, K], [B, T, G, K]
        known = state if state is not None and state[0].shape[1] else None
        o, new_state = self.core(q, k, v, layout=layout, initial_state=known, output_final_state=state is not None)
        return self.o_proj(o.flatten(-2)), new_state

    def _angles(self, x: Tensor, layout: Layout | None, state: KVState | None) -> Tensor:
        if layout is not None:
            return layout.positions
        if state is not None and state[0].shape[1]:
            raise ValueError("layout: None; attention that continues from a state needs the positions of its tokens")
        return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)

    def sharding(self) -> Sharding:
        heads, groups, norm = self.config.heads, self.config.kv_heads, self.config.qk_norm
        cuts = cut_outputs(self, ("q_proj",), heads) | {"o_proj.weight": Cut(1, (heads,))}
        cuts |= cut_outputs(self, ("k_proj", "v_proj"), groups, repeats=norm != "full")
        norms = ("q_norm", "k_norm")
        if norm == "full":  # a key head on several ranks would count several times in the norm over all of them
            cuts |= cut_outputs(self, ("q_norm",), heads) | cut_outputs(self, ("k_norm",), groups)
            return Sharding(cuts=cuts, rows=("o_proj",), spanning=norms)
        partial = tuple(f"{name}.weight" for name in norms) if norm == "head" else ()
        return Sharding(cuts=cuts, rows=("o_proj",), partial=partial)

    def init_state(self, batch_size: int, device: torch.device | str) -> KVState:
        """No keys yet: the cache takes the dtype of the first keys that enter it."""
        shape = (batch_size, 0, self.k_proj.out_features // self.config.head_dim, self.config.head_dim)
        return torch.empty(shape, device=device), torch.empty(shape, device=device)

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, and scores and values over the mean number of keys that a query of a full row sees."""
        width, queries = self.q_proj.in_features, self.q_proj.out_features
        window = min(self.window or sequence_length, sequence_length)
        keys_seen = window - window * (window - 1) / (2 * sequence_length)
        return int(2 * (width * (2 * queries + 2 * self.k_proj.out_features) + 2 * queries * keys_seen))


class LocalAttention(Attention):
    """Attention over a sliding window (Beltagy et al., 2020): state and cost per token do not grow with the context."""

    config_class: ClassVar[type] = LocalAttentionConfig
    config: LocalAttentionConfig

    def _core(self, placement: Placement) -> OpCore:
        return placement.core(local_attention, window=self.config.window)

    @property
    def window(self) -> int | None:
        return self.config.window
