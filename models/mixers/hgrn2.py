"""The token mixer of HGRN2: gated linear attention whose keys are what its decays leave over.

Qin et al., 2024, "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904), section 3; the lower bounds of the
decays, which rise with depth, are those of HGRN (Qin et al., 2023, arXiv 2311.04823, section 3.2).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.init import Initializer, Linear, constant
from models.mixers.conv import ShortConv
from models.mixers.placement import Placement
from models.norm import RMSNorm
from models.sharding import Cut, Sharding, cut_outputs
from ops import Layout, gated_linear_attention

State = tuple[Tensor, ...]
"""The matrix states [B, H, K, V], after the states of the three convolutions where there are any."""


@dataclass(frozen=True, kw_only=True)
class HGRN2Config:
    """At least one of `heads` and `expand_ratio` is given; alone, it makes key and value heads equally wide.

    Attributes:
        heads: H, each with V = model width / H value features; by default model width / expand_ratio.
        expand_ratio: K, key features of a head: a value is expanded into as many rows of the state. By default V.
        lower_bound: whether decays are bounded from below, by bounds that rise from 0 in the first layer of the kind.
        conv_width: taps of the causal convolutions of queries, forget gates and inputs; null for none.
        conv_bias: whether these have biases.
        norm_eps: of the norm before the output map; flash-linear-attention's HGRN2 has 1e-5 whatever its settings say.
    """

    heads: int | None = None
    expand_ratio: int | None = None
    lower_bound: bool = True
    conv_width: int | None = None
    conv_bias: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.heads is None and self.expand_ratio is None:
            raise ValueError("heads, expand_ratio: both null; give one, for example expand_ratio: 128")
        for key in ("heads", "expand_ratio", "conv_width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value}; must be at least 1")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps: {self.norm_eps}; must be positive")
        if self.conv_bias and self.conv_width is None:
            raise ValueError("conv_bias: true without a convolution; set conv_width, for example 4")

    def head_shape(self, width: int) -> tuple[int, int, int]:
        """(H, K, V) in a model of `width`."""
        key, parts = ("expand_ratio", self.expand_ratio) if self.heads is None else ("heads", self.heads)
        assert parts is not None
        if width % parts:
            fitting = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - parts))
            raise ValueError(f"{key}: {parts}; must divide the model's width ({width}): choose e.g. {fitting}")
        heads = width // parts if self.heads is None else parts
        return heads, self.expand_ratio or width // heads, width // heads

    def num_params(self, width: int) -> int:
        heads, keys, _ = self.head_shape(width)
        projections = 2 * width * heads * keys + 2 * width * width
        taps = 0 if self.conv_width is None else self.conv_width + self.conv_bias
        return projections + taps * (2 * heads * keys + width) + width

    def num_shared_params(self, width: int, count: int) -> int:
        heads, keys, _ = self.head_shape(width)
        return count * heads * keys if self.lower_bound and count > 1 else 0


class LowerBounds(nn.Module):
    """The bounds of all layers: a softmax over depth for each channel, summed up from the second layer on.

    They start evenly spaced: layer i of n has i / n.
    """

    def __init__(self, count: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.lower_bounds = nn.Parameter(torch.empty(count, channels))

    def initializers(self) -> dict[str, Initializer]:
        return {"lower_bounds": constant(0.0)}

    def sharding(self) -> Sharding:
        return Sharding(cuts={"lower_bounds": Cut(1, (self.heads,))})

    def forward(self, index: int) -> tuple[Tensor, Tensor]:
        """log(bound) and log(1 - bound) of layer `index` >= 1, at least fp32 `[H * K]` each.

        Both are sums of shares, so that neither loses its digits where the other is close to 1.
        """
        shares = self.lower_bounds.to(torch.promote_types(self.lower_bounds.dtype, torch.float32)).log_softmax(0)
        below, above = shares[1 : index + 1], torch.cat([shares[:1], shares[index + 1 :]])
        return below.logsumexp(0), above.logsumexp(0)


class HGRN2(nn.Module):
    """`[B, T, D] -> [B, T, D]` through H matrix states of K x V, each with its own decays."""

    config_class: ClassVar[type] = HGRN2Config

    def __init__(self, config: HGRN2Config, placement: Placement) -> None:
        super().__init__()
        width, self.index = placement.width, placement.index
        heads, self.keys, self.values = config.head_shape(width)
        # A tuple hides the module from this one: its parameters are the model's, once, and not each layer's.
        self.shared: tuple[nn.Module, ...] = ()
        if config.lower_bound and self.index > 0:
            assert placement.shared is not None, "a bounded layer needs what `shared_module` returns"
            self.shared = (placement.shared,)
        self.q_proj = Linear(width, heads * self.keys, bias=False)
        self.f_proj = Linear(width, heads * self.keys, bias=False)
        self.i_proj = Linear(width, width, bias=False)
        self.q_conv = self._conv(self.q_proj, config, placement)
        self.f_conv = self._conv(self.f_proj, config, placement)
        self.i_conv = self._conv(self.i_proj, config, placement)
        self.core = placement.core(gated_linear_attention)
        self.norm = RMSNorm(width, eps=config.norm_eps, one_plus_weight=False)
        self.o_proj = Linear(width, width, bias=False, variance_scale=placement.output_scale)

    @staticmethod
    def _conv(projection: Linear, config: HGRN2Config, placement: Placement) -> ShortConv | None:
        if config.conv_width is None:
            return None
        return ShortConv(projection.out_features, config.conv_width, placement, bias=config.conv_bias)

    @classmethod
    def shared_module(cls, config: HGRN2Config, width: int, count: int) -> LowerBounds | None:
        """The bounds of `count` layers; None where none is bounded."""
        channels = config.num_shared_params(width, count) // count
        return LowerBounds(count, channels, config.head_shape(width)[0]) if channels else None

    @property
    def convs(self) -> tuple[ShortConv, ...]:
        return tuple(conv for conv in (self.q_conv, self.f_conv, self.i_conv) if conv is not None)

    def forward(self, x: Tensor, layout: Layout | None, state: State | None = None) -> tuple[Tensor, State | None]:
        streams = [proj(x) for proj in (self.q_proj, self.f_proj, self.i_proj)]
        new_state = []
        for i, conv in enumerate(self.convs):
            streams[i], conv_state = conv(streams[i], layout, None if state is None else state[i], state is not None)
            new_state.append(conv_state)
        q, f, v = streams
        k, log_decay = self.gated(f)
        q, k, log_decay = (z.unflatten(-1, (-1, self.keys)) for z in (F.silu(q), k, log_decay))
        o, memory = self.core(
            q,
            k,
            v.unflatten(-1, (-1, self.values)),
            log_decay,
            layout=layout,
            initial_state=None if state is None else state[-1],
            output_final_state=state is not None,
        )
        return self.o_proj(self.norm(o.flatten(-2))), None if state is None else (*new_state, memory)

    def gated(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Keys 1 - decay and log decay, at least fp32 `[B, T, H * K]` each; decay = bound + (1 - bound) sigmoid(f).

        Each is formed by itself: a key taken from the log decay would lose its digits where the decay is close to 1.
        """
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        if not self.shared:
            return torch.sigmoid(-f), F.logsigmoid(f)
        log_bound, log_rest = self.read_shared()
        log_decay = torch.logaddexp(log_bound, log_rest + F.logsigmoid(f))
        return log_rest.exp() * torch.sigmoid(-f), log_decay.clamp(max=0.0)  # rounding may leave it above

    def read_shared(self) -> tuple[Tensor, Tensor]:
        """What `LowerBounds` has for this layer."""
        return self.shared[0](self.index)

    def sharding(self) -> Sharding:
        heads = self.norm.weight.numel() // self.values
        parts = ("q_proj", "f_proj", "i_proj", "q_conv", "f_conv", "i_conv", "norm")
        own = {"o_proj.weight": Cut(1, (heads,))}
        return Sharding(cuts=cut_outputs(self, parts, heads) | own, rows=("o_proj",), spanning=("norm",))

    def init_state(self, batch_size: int, device: torch.device | str) -> State:
        heads = self.q_proj.out_features // self.keys
        memory = torch.zeros(batch_size, heads, self.keys, self.values, dtype=torch.float32, device=device)
        return *(conv.init_state(batch_size, device) for conv in self.convs), memory

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, convolutions, and for each entry of the state its decay, its update and its reading."""
        projections = sum(proj.weight.numel() for proj in (self.q_proj, self.f_proj, self.i_proj, self.o_proj))
        taps = sum(conv.weight.numel() for conv in self.convs)
        return 2 * (projections + taps + 3 * self.q_proj.out_features * self.values)
