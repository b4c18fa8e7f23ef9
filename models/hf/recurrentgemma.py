"""Griffin models as transformers' `RecurrentGemmaForCausalLM`: which are the same function, and under which names.

De et al., 2024 (arXiv 2402.19427); Botev et al., 2024 (arXiv 2404.07839).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import RecurrentGemmaConfig

from models.config import ModelConfig
from models.hf.formats import Format, Loaded, Names, Requirement, TokenIds, obstacles
from models.hf.loading import load_transformers, require
from models.mixers import MixerConfigs
from models.mixers.attention import LocalAttentionConfig
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig

ARCHITECTURE = "RecurrentGemmaForCausalLM"
BLOCK_TYPES = {"rglru": "recurrent", "local_attention": "attention"}

_BLOCK = {
    "mixer_norm": "temporal_pre_norm",
    "mlp_norm": "channel_pre_norm",
    "mlp.gate": "mlp_block.gate_proj",
    "mlp.up": "mlp_block.up_proj",
    "mlp.down": "mlp_block.down_proj",
}
_RGLRU = {
    "mixer.x_proj": "temporal_block.linear_x",
    "mixer.gate_proj": "temporal_block.linear_y",
    "mixer.out_proj": "temporal_block.linear_out",
    "mixer.conv": "temporal_block.conv_1d",
    "mixer.input_gate.": "temporal_block.rg_lru.input_gate_",
    "mixer.recurrence_gate.": "temporal_block.rg_lru.recurrent_gate_",
    "mixer.decay_param": "temporal_block.rg_lru.recurrent_param",
}
NAMES = Names(
    outer={"embed.weight": "model.embed_tokens.weight", "head.norm.weight": "model.final_norm.weight"},
    blocks={"rglru": _BLOCK | _RGLRU, "local_attention": _BLOCK | {"mixer.": "temporal_block."}},
)


def differences(config: ModelConfig) -> list[str]:
    """What keeps a model from being a RecurrentGemma: one line a key, with its value, the requirement and a way out."""
    return obstacles("RecurrentGemma", _requirements(config))


def _requirements(config: ModelConfig) -> Iterator[Requirement]:
    foreign = tuple(sorted(set(config.layers) - BLOCK_TYPES.keys()))
    yield "model.layers", foreign, not foreign, f"layers of {' and '.join(BLOCK_TYPES)} alone"
    yield "model.tie_embeddings", config.tie_embeddings, config.tie_embeddings, "true"
    yield "model.scale_embeddings", config.scale_embeddings, config.scale_embeddings, "true"
    yield "model.norm_one_plus_weight", config.norm_one_plus_weight, config.norm_one_plus_weight, "true"
    yield "model.post_norm", config.post_norm, not config.post_norm, "none, its blocks normalise inputs"
    yield "model.logit_soft_cap", config.logit_soft_cap, config.logit_soft_cap is not None, "a number, it uses 30"
    yield "model.mlp.activation", config.mlp.activation, config.mlp.activation == "gelu_tanh", "gelu_tanh"
    yield "model.mlp.bias", config.mlp.bias, config.mlp.bias, "true"
    heads = _heads(config)
    if "local_attention" in config.layers:
        yield from _attention_requirements(config.mixer("local_attention"), config.width)
    if "rglru" in config.layers:
        recurrence: RGLRUConfig = config.mixer("rglru")
        blocks, key = recurrence.gate_blocks, "model.mixers.rglru"
        yield f"{key}.gate_blocks", blocks, blocks == heads, f"as many as attention heads, {heads}"
        # it decodes right at any width, but a prompt of one token fails unless the widths are equal
        yield f"{key}.width", recurrence.width, recurrence.width == config.width, f"model.width, {config.width}"
    yield "model.width", config.width, config.width % heads == 0, f"a multiple of the heads, {heads}"


def _attention_requirements(attention: LocalAttentionConfig, width: int) -> Iterator[Requirement]:
    key, inner = "model.mixers.local_attention", attention.heads * attention.head_dim
    yield f"{key}.head_dim", attention.head_dim, inner == width, f"model.width / heads, {width} / {attention.heads}"
    yield f"{key}.output_bias", attention.output_bias, attention.output_bias, "true"
    yield f"{key}.qk_norm", attention.qk_norm, attention.qk_norm == "none", "none"
    yield f"{key}.rotary_fraction", attention.rotary_fraction, attention.rotary_dim > 0, "more than 0"


def _heads(config: ModelConfig) -> int:
    """The one number that RecurrentGemma has for attention heads and gate blocks alike."""
    if "local_attention" in config.layers:
        return config.mixer("local_attention").heads
    return config.mixer("rglru").gate_blocks if "rglru" in config.layers else 1


def to_hf_config(config: ModelConfig, **token_ids: Any) -> RecurrentGemmaConfig:
    """
    Args:
        config: of a model without `differences`.
        token_ids: `pad_token_id`, `bos_token_id`, `eos_token_id`, as far as there are any.
    """
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "lru_width": config.width,
        "num_hidden_layers": len(config.layers),
        "block_types": [BLOCK_TYPES[kind] for kind in config.layers],
        "num_attention_heads": _heads(config),
        "intermediate_size": 2 * config.mlp.width,  # it halves this
        "rms_norm_eps": config.norm_eps,
        "logits_soft_cap": config.logit_soft_cap,
    }
    if "rglru" in config.layers:
        settings["conv1d_width"] = config.mixer("rglru").conv_width
    if "local_attention" in config.layers:
        attention: LocalAttentionConfig = config.mixer("local_attention")
        settings |= {
            "num_key_value_heads": attention.kv_heads,
            "attention_window_size": attention.window,
            "attention_bias": attention.qkv_bias,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": attention.rotary_theta,
                "partial_rotary_factor": attention.rotary_fraction,
            },
        }
    return RecurrentGemmaConfig(**settings, **token_ids, architectures=[ARCHITECTURE])


def _config_json(config: ModelConfig, ids: TokenIds) -> dict[str, Any]:
    return to_hf_config(config, **ids._asdict()).to_diff_dict()


def _model_config(values: Mapping[str, Any]) -> ModelConfig:
    published = {"block_types": values["_block_types"]} if "_block_types" in values else {}
    theirs: Any = RecurrentGemmaConfig.from_dict(published | dict(values))
    kinds = {there: here for here, there in BLOCK_TYPES.items()}
    pattern, depth = theirs.block_types, theirs.num_hidden_layers
    for kind in pattern:
        require("block_types", kind, kind in kinds, " or ".join(kinds))
    activation, rope = theirs.hidden_activation, theirs.rope_parameters
    require("hidden_activation", activation, activation == "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    require("tie_word_embeddings", theirs.tie_word_embeddings, theirs.tie_word_embeddings, "true")
    require("rope_parameters.rope_type", rope["rope_type"], rope["rope_type"] == "default", "default")
    layers = tuple(kinds[pattern[i % len(pattern)]] for i in range(depth))
    attention = LocalAttentionConfig(
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        window=theirs.attention_window_size,
        rotary_fraction=rope.get("partial_rotary_factor", 1.0),
        rotary_theta=rope["rope_theta"],
        qkv_bias=theirs.attention_bias,
        output_bias=True,
    )
    recurrence = RGLRUConfig(
        width=theirs.lru_width, gate_blocks=theirs.num_attention_heads, conv_width=theirs.conv1d_width
    )
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        width=theirs.hidden_size,
        layers=layers,
        mixers=MixerConfigs(
            rglru=recurrence if "rglru" in layers else None,
            local_attention=attention if "local_attention" in layers else None,
        ),
        mlp=MLPConfig(width=theirs.intermediate_size // 2),
        norm_eps=theirs.rms_norm_eps,
        logit_soft_cap=theirs.logits_soft_cap,
    )


def _load(directory: Path) -> Loaded:
    from transformers import RecurrentGemmaForCausalLM

    return load_transformers(RecurrentGemmaForCausalLM, directory)


def hf_name(name: str, layers: tuple[str, ...]) -> str:
    """RecurrentGemma's name of the parameter that `LM` calls `name`."""
    return NAMES.of(name, layers)


def to_hf_weights(weights: dict[str, Tensor], layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights, or gradients, of an `LM` under RecurrentGemma's names and shapes."""
    return {hf_name(name, layers): w.unsqueeze(1) if _is_conv(name) else w for name, w in weights.items()}


def from_hf_weights(state: dict[str, Tensor], names: list[str], layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights, or gradients, of a RecurrentGemma under the `names` and in the shapes of an `LM`."""
    found = {name: state[hf_name(name, layers)] for name in names}
    return {name: w.squeeze(1) if _is_conv(name) else w for name, w in found.items()}


def _is_conv(name: str) -> bool:
    """Their convolution's weight is `[R, 1, W]`, ours `[R, W]`."""
    return name.endswith("mixer.conv.weight")


RECURRENTGEMMA = Format(
    name="recurrentgemma",
    model_type="recurrent_gemma",
    architecture=ARCHITECTURE,
    library="transformers 5 or later",
    fits=differences,
    config_json=_config_json,
    tensors=NAMES.tensors,
    model_config=_model_config,
    load_for_check=_load,
    notes=(
        "Generate from one prompt at a time, or from prompts of equal length: padding leaks through the convolutions.",
        "After a `generate` a prompt of one token starts from the convolution state that it left; longer ones do not.",
    ),
)
