"""What a model is made of, as frozen data."""

import difflib
from dataclasses import dataclass
from typing import Any

from models.mixers import MIXERS, MixerConfigs
from models.mlp import MLPConfig
from ops import check_impl


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """
    Attributes:
        vocab_size: N, rows of the embedding; equal to the tokenizer's.
        width: D of the residual stream.
        layers: the mixer of each block, first to last; the depth is its length.
        mixers: the settings of each mixer that `layers` names.
        mlp: the MLP of every block.
        norm_eps, norm_one_plus_weight: every RMS norm outside the mixers.
        post_norm: the mixers whose blocks normalise what mixer and MLP put out instead of what they get, as the
            attention blocks of OlmoHybrid do.
        tie_embeddings: the head's matrix is the embedding.
        scale_embeddings: multiply embeddings by sqrt(D), rounded to bf16 as RecurrentGemma does, so that an exported
            model is the trained one.
        logit_soft_cap: logits become cap * tanh(logits / cap); None leaves them as they are.
        impl: op name -> implementation, for ops that shall not be chosen automatically.
    """

    vocab_size: int
    width: int
    layers: tuple[str, ...]
    mixers: MixerConfigs
    mlp: MLPConfig
    norm_eps: float = 1e-6
    norm_one_plus_weight: bool = True
    post_norm: tuple[str, ...] = ()
    tie_embeddings: bool = True
    scale_embeddings: bool = True
    logit_soft_cap: float | None = 30.0
    impl: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for key in ("vocab_size", "width"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; must be at least 1")
        if not self.layers:
            raise ValueError("layers: empty; name at least one mixer, for example {pattern: [rglru], repeat: 2}")
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise ValueError(f"logit_soft_cap: {self.logit_soft_cap}; must be positive, or null for none")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps: {self.norm_eps}; must be positive")
        for op, choice in (self.impl or {}).items():
            try:
                check_impl(op, choice)
            except ValueError as error:
                raise ValueError(f"impl.{op}: {choice!r}; {error}") from None
        for kind in dict.fromkeys(self.layers):
            if kind not in MIXERS:
                close = difflib.get_close_matches(kind, MIXERS, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"layers: {kind!r} is no mixer; choose from {', '.join(MIXERS)}{hint}")
            if getattr(self.mixers, kind) is None:
                raise ValueError(f"layers: {kind!r} has no settings; add them under mixers.{kind}")
            try:
                self.mixer(kind).num_params(self.width)
            except ValueError as error:  # its heads do not fit the model's width
                raise ValueError(f"mixers.{kind}.{error}") from None
        for kind in self.post_norm:
            if kind not in self.layers:
                raise ValueError(
                    f"post_norm: {kind!r} is the mixer of no layer; choose from {', '.join(dict.fromkeys(self.layers))}"
                )

    def mixer(self, kind: str) -> Any:
        """The settings of the mixer called `kind`."""
        return getattr(self.mixers, kind)

    def num_params(self) -> int:
        """Parameters of the whole model, the tied matrix once."""
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        block = self.mlp.num_params(self.width) + 2 * self.width
        mixers = sum(self.mixer(kind).num_params(self.width) for kind in self.layers)
        shared = sum(
            self.mixer(kind).num_shared_params(self.width, self.layers.count(kind))
            for kind in set(self.layers)
            if hasattr(MIXERS[kind], "shared_module")
        )
        return embeddings + len(self.layers) * block + mixers + shared + self.width
