"""Gated DeltaNet hybrids in OlmoHybrid's block structure as transformers' `OlmoHybridForCausalLM`.

Pre-norm recurrent blocks, post-norm attention blocks with normalised queries and keys, one convolution over
[q | k | v].
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import OlmoHybridConfig

from models.config import ModelConfig
from models.hf.delta_conv import in_thirds, split_convolution
from models.hf.formats import Format, Loaded, Names, Requirement, TokenIds, obstacles
from models.hf.loading import import_without, load_transformers, require
from models.mixers import MixerConfigs
from models.mixers.attention import AttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from models.mlp import MLPConfig

ARCHITECTURE = "OlmoHybridForCausalLM"
LAYER_TYPES = {"gated_deltanet": "linear_attention", "attention": "full_attention"}
OUTPUT_NORM_EPS = 1e-5
"""Of the norm of each head's output, fixed in the class."""

_MLP = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
_DELTA = {
    "mixer_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mixer.": "linear_attn.",
    "mixer.decay_proj": "linear_attn.a_proj",
    "mixer.beta_proj": "linear_attn.b_proj",
    "mixer.gate_proj": "linear_attn.g_proj",
    "mixer.conv": "linear_attn.{}_conv1d",
    "mixer.norm": "linear_attn.o_norm",
}
_ATTENTION = {
    "mixer_norm": "post_attention_layernorm",
    "mlp_norm": "post_feedforward_layernorm",
    "mixer.": "self_attn.",
}


def _names(delta: dict[str, str], attention: dict[str, str]) -> Names:
    return Names(
        outer={
            "embed.weight": "model.embed_tokens.weight",
            "head.norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight",
        },
        blocks={"gated_deltanet": _MLP | _DELTA | delta, "attention": _MLP | _ATTENTION | attention},
    )


NAMES = _names({}, {})
"""As Olmo-Hybrid-7B's weights have them: the class's own names, but for a convolution of each projection."""

_EARLIER = {"mixer_norm": "attention_layer_norm", "mlp_norm": "feedforward_layer_norm"}
EARLIER_NAMES = _names(_EARLIER, {})
"""With other names of the norms before recurrent layers, which the class reads as well."""

SAVED_NAMES = _names(_EARLIER, {"mixer_norm": "feedforward_layer_norm"})
"""As transformers' save_pretrained writes them: it turns a name back in all layers alike, and cuts the convolution in
three equal parts."""

OWN_NAMES = _names({"mixer.conv": "linear_attn.conv1d"}, {})
"""As the class calls its parameters: one convolution."""


def _fits(config: ModelConfig) -> list[str]:
    return obstacles("OlmoHybrid", _requirements(config))


def _requirements(config: ModelConfig) -> Iterator[Requirement]:
    kinds = set(config.layers)
    yield "model.layers", tuple(sorted(kinds)), kinds == LAYER_TYPES.keys(), f"both {' and '.join(LAYER_TYPES)}"
    yield "model.post_norm", config.post_norm or "none", set(config.post_norm) == {"attention"}, "[attention]"
    plain = not config.norm_one_plus_weight
    yield "model.norm_one_plus_weight", config.norm_one_plus_weight, plain, "false"
    yield "model.scale_embeddings", config.scale_embeddings, not config.scale_embeddings, "false"
    yield "model.logit_soft_cap", config.logit_soft_cap, config.logit_soft_cap is None, "null"
    yield "model.mlp.activation", config.mlp.activation, config.mlp.activation == "silu", "silu"
    yield "model.mlp.bias", config.mlp.bias, not config.mlp.bias, "false"
    if "gated_deltanet" in kinds:
        mixer: GatedDeltaNetConfig = config.mixer("gated_deltanet")
        key = "model.mixers.gated_deltanet"
        yield f"{key}.conv_width", mixer.conv_width, mixer.conv_width is not None, "a convolution, it uses 4"
        yield f"{key}.conv_bias", mixer.conv_bias, not mixer.conv_bias, "false"
        yield f"{key}.output_gate", mixer.output_gate, mixer.output_gate, "true"
        yield f"{key}.norm_eps", mixer.norm_eps, mixer.norm_eps == OUTPUT_NORM_EPS, f"{OUTPUT_NORM_EPS}"
    if "attention" in kinds:
        yield from _attention_requirements(config.mixer("attention"), config.norm_eps)


def _attention_requirements(attention: AttentionConfig, norm_eps: float) -> Iterator[Requirement]:
    key = "model.mixers.attention"
    yield f"{key}.qk_norm", attention.qk_norm, attention.qk_norm == "full", "full"
    yield f"{key}.qk_norm_eps", attention.qk_norm_eps, attention.qk_norm_eps == norm_eps, f"norm_eps, {norm_eps}"
    biases = attention.qkv_bias == attention.output_bias
    yield f"{key}.output_bias", attention.output_bias, biases, "as many biases before attention as after it"
    rotated = attention.rotary_dim in (0, attention.head_dim)
    yield f"{key}.rotary_fraction", attention.rotary_fraction, rotated, "1, or 0 for none"


def _config_json(config: ModelConfig, ids: TokenIds) -> dict[str, Any]:
    mixer: GatedDeltaNetConfig = config.mixer("gated_deltanet")
    attention: AttentionConfig = config.mixer("attention")
    theta = attention.rotary_theta if attention.rotary_dim else None
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp.width,
        "num_hidden_layers": len(config.layers),
        "layer_types": [LAYER_TYPES[kind] for kind in config.layers],
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "linear_num_key_heads": mixer.heads,
        "linear_num_value_heads": mixer.num_value_heads,
        "linear_key_head_dim": mixer.head_dim,
        "linear_value_head_dim": mixer.value_dim,
        "linear_conv_kernel_dim": mixer.conv_width,
        "linear_allow_neg_eigval": mixer.negative_eigenvalues,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
    return OlmoHybridConfig(**settings, **ids._asdict(), architectures=[ARCHITECTURE]).to_diff_dict()


def _model_config(values: Mapping[str, Any]) -> ModelConfig:
    theirs: Any = OlmoHybridConfig.from_dict(dict(values))
    kinds = {there: here for here, there in LAYER_TYPES.items()}
    types = list(theirs.layer_types)
    require("layer_types", len(types), len(types) == theirs.num_hidden_layers, "as many entries as num_hidden_layers")
    for kind in types:
        require("layer_types", kind, kind in kinds, " or ".join(kinds))
    require("hidden_act", theirs.hidden_act, theirs.hidden_act == "silu", "silu")
    rope = theirs.rope_parameters or {}
    rotation, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
    require("rope_parameters.rope_type", rotation, theta is None or rotation == "default", "default")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    attention = AttentionConfig(
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=head_dim,
        rotary_fraction=0.0 if theta is None else 1.0,
        rotary_theta=AttentionConfig.rotary_theta if theta is None else theta,
        qkv_bias=theirs.attention_bias,
        output_bias=theirs.attention_bias,
        qk_norm="full",
        qk_norm_eps=theirs.rms_norm_eps,
    )
    value_heads = theirs.linear_num_value_heads
    mixer = GatedDeltaNetConfig(
        heads=theirs.linear_num_key_heads,
        value_heads=None if value_heads == theirs.linear_num_key_heads else value_heads,
        head_dim=theirs.linear_key_head_dim,
        expand_v=theirs.linear_value_head_dim / theirs.linear_key_head_dim,
        conv_width=theirs.linear_conv_kernel_dim,
        negative_eigenvalues=theirs.linear_allow_neg_eigval,
        norm_eps=OUTPUT_NORM_EPS,
    )
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        width=theirs.hidden_size,
        layers=tuple(kinds[kind] for kind in types),
        mixers=MixerConfigs(gated_deltanet=mixer, attention=attention),
        mlp=MLPConfig(width=theirs.intermediate_size, activation="silu", bias=False),
        norm_eps=theirs.rms_norm_eps,
        norm_one_plus_weight=False,
        post_norm=("attention",),
        tie_embeddings=theirs.tie_word_embeddings,
        scale_embeddings=False,
        logit_soft_cap=None,
    )


def _load(directory: Path) -> Loaded:
    """Through the class's torch forms, which it takes where these libraries are not installed."""
    modeling = import_without("transformers.models.olmo_hybrid.modeling_olmo_hybrid", "fla", "causal_conv1d")
    return load_transformers(modeling.OlmoHybridForCausalLM, directory)


OLMO_HYBRID = Format(
    name="olmo_hybrid",
    model_type="olmo_hybrid",
    architecture=ARCHITECTURE,
    library="transformers 5 or later",
    fits=_fits,
    config_json=_config_json,
    tensors=split_convolution(NAMES.tensors),
    layouts=(
        split_convolution(EARLIER_NAMES.tensors),
        split_convolution(SAVED_NAMES.tensors, in_thirds),
        OWN_NAMES.tensors,
    ),
    model_config=_model_config,
    load_for_check=_load,
    notes=(
        "With flash-linear-attention installed, the class needs a GPU; on a CPU load it where that is not installed.",
    ),
)
