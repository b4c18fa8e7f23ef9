"""Tiny models of every mixer, alone and together, whose every parameter matters."""

from typing import Any

from models.config import ModelConfig
from models.mixers import MIXERS, MixerConfigs
from models.mixers.attention import AttentionConfig, LocalAttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from models.mixers.hgrn2 import HGRN2Config
from models.mixers.paralstm import ParaLSTMConfig
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig

WIDTH = 16

SETTINGS: dict[str, Any] = {
    "attention": AttentionConfig(heads=4, kv_heads=2, head_dim=4, qk_norm="head"),
    "gated_deltanet": GatedDeltaNetConfig(heads=2, head_dim=4, value_heads=4, negative_eigenvalues=True),
    "hgrn2": HGRN2Config(heads=2, conv_width=4),
    "local_attention": LocalAttentionConfig(heads=2, kv_heads=1, head_dim=8, window=4),
    "paralstm": ParaLSTMConfig(width=WIDTH, heads=2),
    "rglru": RGLRUConfig(width=WIDTH, gate_blocks=2),
}

STACKS: dict[str, tuple[str, ...]] = {kind: (kind, kind) for kind in MIXERS} | {"all": (*MIXERS, "hgrn2")}
"""Two layers of each kind, as HGRN2's second one is the first with a bound, and one stack of all."""


def stack_config(layers: tuple[str, ...], vocab_size: int = 61, **settings: Any) -> ModelConfig:
    mixers = MixerConfigs(**{kind: SETTINGS[kind] for kind in layers})
    return ModelConfig(
        vocab_size=vocab_size, width=WIDTH, layers=layers, mixers=mixers, mlp=MLPConfig(width=20), **settings
    )
