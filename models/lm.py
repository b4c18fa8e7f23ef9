"""The language model: embedding, a loop over blocks, and a head that owns the loss."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.block import Block
from models.config import ModelConfig
from models.init import Initializer, initialize, normal
from models.mixers import MIXERS
from models.mixers.placement import Placement
from models.norm import RMSNorm
from ops import Layout, linear_cross_entropy, resolve_impl

State = tuple[Any, ...]
"""One entry a block, each its mixer's own."""

JUDGED_LOGITS = 2**25
"""Logits that `likeliest` holds at once."""


class Embedding(nn.Module):
    """`[B, T] -> [B, T, D]`. Rows start as N(0, 1 / D): with the scale of sqrt(D) the stream starts at unit variance,
    and so do the logits of a tied head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))
        root = torch.tensor(config.width**0.5, dtype=torch.bfloat16, device="cpu")
        self.scale = root.item() if config.scale_embeddings else 1.0

    def initializers(self) -> dict[str, Initializer]:
        return {"weight": normal(self.weight.shape[1] ** -0.5)}

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.embedding(input_ids, self.weight) * self.scale


class Head(nn.Module):
    """Final norm and the map to the vocabulary; with labels, the loss, without ever holding all logits.

    Args:
        tied: the embedding whose matrix is used, or None for a matrix of its own.

    Attributes:
        judges: while it is a number, what a label yields beside its nll is not the log normaliser but the most likely
            of so many first entries.
    """

    def __init__(self, config: ModelConfig, tied: Embedding | None, *, device_type: str = "cpu") -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, eps=config.norm_eps, one_plus_weight=config.norm_one_plus_weight)
        self.weight = tied.weight if tied is not None else nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.tied = tied is not None
        self.logit_soft_cap = config.logit_soft_cap
        self.judges: int | None = None
        choice = (config.impl or {}).get("linear_cross_entropy", "auto")
        self.impl = resolve_impl("linear_cross_entropy", choice, device_type)

    def initializers(self) -> dict[str, Initializer]:
        return {} if self.tied else {"weight": normal(self.weight.shape[1] ** -0.5)}

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Without labels the logits `[B, T, N]`, in fp32, or wider where x is. With labels the negative log likelihood
        and the log normaliser of each, `[B, T]` fp32 both, 0 where the label is -100."""
        x = self.norm(x)
        if labels is not None:
            nll, log_z = linear_cross_entropy(
                x, self.weight, labels, logit_soft_cap=self.logit_soft_cap, impl=self.impl
            )
            return nll, log_z if self.judges is None else likeliest(x, self.weight[: self.judges])[1].to(nll.dtype)
        logits = nn.functional.linear(x, self.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.logit_soft_cap is None:
            return logits
        return self.logit_soft_cap * torch.tanh(logits / self.logit_soft_cap)

    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()


@torch.no_grad()
def likeliest(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of the logits `weight x` of each token and the first entry that has it, `[...]` each.

    x is `[..., D]`. In fp32 under autocast, too: among logits rounded to bf16 many are equal. A soft cap, which keeps
    their order, is left out.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, x.shape[-1]).split(max(1, JUDGED_LOGITS // max(1, len(weight))))
    with torch.autocast(x.device.type, enabled=False):
        best = [nn.functional.linear(part.to(dtype), weight.to(dtype)).max(dim=-1) for part in rows]
    logits, entries = (torch.cat(parts).view(x.shape[:-1]) for parts in zip(*best))
    return logits, entries


def _shared_modules(config: ModelConfig) -> Iterator[tuple[str, nn.Module]]:
    """What the mixers of a kind share over the depth, under the name of the kind."""
    for kind in dict.fromkeys(config.layers):
        if hasattr(MIXERS[kind], "shared_module"):
            module = MIXERS[kind].shared_module(config.mixer(kind), config.width, config.layers.count(kind))
            if module is not None:
                yield kind, module


class LM(nn.Module):
    """Decoder-only language model over any stack of mixers.

    Args:
        config: the model.
        seed: initial weights are a function of it and of the parameter names alone.
        device_type: where it will run, for resolving `impl: auto`.
    """

    blocks: Any  # an nn.ModuleList of Block, which type checkers would take for bare modules

    def __init__(self, config: ModelConfig, *, seed: int = 0, device_type: str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.shared = nn.ModuleDict(dict(_shared_modules(config)))
        self.blocks = nn.ModuleList(self._build_blocks(device_type))
        self.head = Head(config, self.embed if config.tie_embeddings else None, device_type=device_type)
        norm_impl = resolve_impl("rms_norm", (config.impl or {}).get("rms_norm", "auto"), device_type)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.impl = norm_impl
        self.reset_parameters(seed)

    def _build_blocks(self, device_type: str) -> Iterator[Block]:
        """Each block; the two maps of it that write into the stream start with variance 2 / depth, so that the stream
        grows by a constant from the first block to the last (De et al., 2024, section 3)."""
        layers, shared = self.config.layers, dict(self.shared.items())
        for i, kind in enumerate(layers):
            placement = Placement(
                width=self.config.width,
                output_scale=2.0 / len(layers),
                index=layers[:i].count(kind),
                count=layers.count(kind),
                shared=shared.get(kind),
                impl=self.config.impl or {},
                device_type=device_type,
            )
            yield Block(self.config, kind, placement)

    def reset_parameters(self, seed: int) -> None:
        if not self.embed.weight.is_meta:
            initialize(self, seed)

    def forward(
        self, input_ids: Tensor, positions: Tensor, labels: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, Any]:
        """
        Args:
            input_ids, positions, labels: int64 `[B, T]`; `positions` counts from 0 inside each document, `labels` are
                shifted already, -100 where there is no target.
            state: of the tokens before these, from `init_state` or an earlier call.

        Returns:
            With labels (nll, log_z), fp32 `[B, T]` each (`Head`). Without, the logits `[B, T, N]` and the state
            after these tokens, None unless one was given.
        """
        x, new_state = self.hidden(input_ids, positions, state)
        if labels is not None:
            return self.head(x, labels)
        return self.head(x), new_state

    def hidden(self, input_ids: Tensor, positions: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """What the head reads, `[B, T, D]`, and the state after these tokens, None unless one was given: for callers
        who need the logits of some tokens only."""
        layout = Layout(positions)
        x = self.embed(input_ids)
        new_state = []
        for block, block_state in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, block_state = block(x, layout, block_state)
            new_state.append(block_state)
        return x, tuple(new_state) if state is not None else None

    def init_state(self, batch_size: int, device: torch.device | str = "cpu") -> State:
        """The state before the first token of `batch_size` rows."""
        return tuple(block.mixer.init_state(batch_size, device) for block in self.blocks)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of one token in a row of `sequence_length`; a training step takes three times as many."""
        blocks = sum(block.flops_per_token(sequence_length) for block in self.blocks)
        return blocks + self.head.flops_per_token()

    def layer_table(self, sequence_length: int) -> list[dict[str, Any]]:
        """One row a layer, one for what the layers of a kind share, and one for the implementation of all norms, whose
        weights are counted where they stand: layer, mixer, impl, parameters, forward FLOPs per token."""
        embedding = self.embed.weight.numel()
        rows: list[dict[str, Any]] = [
            {"layer": "embed", "mixer": "", "impl": "", "parameters": embedding, "flops_per_token": 0}
        ]
        for kind, module in self.shared.items():
            parameters = sum(p.numel() for p in module.parameters())
            rows.append(
                {"layer": f"shared.{kind}", "mixer": "", "impl": "", "parameters": parameters, "flops_per_token": 0}
            )
        for i, block in enumerate(self.blocks):
            rows.append(
                {
                    "layer": f"blocks.{i}",
                    "mixer": block.kind,
                    "impl": block.mixer.core.impl,
                    "parameters": sum(p.numel() for p in block.parameters()),
                    "flops_per_token": block.flops_per_token(sequence_length),
                }
            )
        own = self.num_params() - sum(row["parameters"] for row in rows)
        head = {"layer": "head", "mixer": "tied to embed" if self.head.tied else "", "impl": self.head.impl}
        norms = {"layer": "norms", "mixer": "", "impl": self.head.norm.impl, "parameters": 0, "flops_per_token": 0}
        return [*rows, norms, head | {"parameters": own, "flops_per_token": self.head.flops_per_token()}]
