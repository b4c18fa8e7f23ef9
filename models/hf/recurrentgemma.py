"""Griffin models as transformers' `RecurrentGemmaForCausalLM`: which are the same function, and under which names.

De et al., 2024 (arXiv 2402.19427); Botev et al., 2024 (arXiv 2404.07839).
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import RecurrentGemmaConfig

from models.config import ModelConfig
from models.mixers.attention import LocalAttentionConfig
from models.mixers.rglru import RGLRUConfig

BLOCK_TYPES = {"rglru": "recurrent", "local_attention": "attention"}

_BLOCK_NAMES = {
    "mixer_norm": "temporal_pre_norm",
    "mlp_norm": "channel_pre_norm",
    "mlp.gate": "mlp_block.gate_proj",
    "mlp.up": "mlp_block.up_proj",
    "mlp.down": "mlp_block.down_proj",
}
_MIXER_NAMES = {
    "rglru": {
        "x_proj": "linear_x",
        "gate_proj": "linear_y",
        "out_proj": "linear_out",
        "conv": "conv_1d",
        "input_gate.": "rg_lru.input_gate_",
        "recurrence_gate.": "rg_lru.recurrent_gate_",
        "decay_param": "rg_lru.recurrent_param",
    },
    "local_attention": {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
}


def differences(config: ModelConfig) -> list[str]:
    """What keeps a model from being a RecurrentGemma: one line a key, with its value, the requirement and a way out."""
    return [
        f"{key}: {value}; RecurrentGemma needs {requirement}"
        for key, value, fits, requirement in _requirements(config)
        if not fits
    ]


def _requirements(config: ModelConfig) -> Iterator[tuple[str, Any, bool, str]]:
    """(key, value, whether it fits, requirement)."""
    foreign = sorted(set(config.layers) - BLOCK_TYPES.keys())
    yield "model.layers", ", ".join(foreign), not foreign, f"layers of {' and '.join(BLOCK_TYPES)} alone"
    yield "model.tie_embeddings", config.tie_embeddings, config.tie_embeddings, "true"
    yield "model.scale_embeddings", config.scale_embeddings, config.scale_embeddings, "true"
    yield "model.norm_one_plus_weight", config.norm_one_plus_weight, config.norm_one_plus_weight, "true"
    yield "model.post_norm", ", ".join(config.post_norm), not config.post_norm, "none, its blocks normalise inputs"
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


def _attention_requirements(attention: LocalAttentionConfig, width: int) -> Iterator[tuple[str, Any, bool, str]]:
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
    return RecurrentGemmaConfig(**settings, **token_ids, architectures=["RecurrentGemmaForCausalLM"], dtype="float32")


def hf_name(name: str, layers: tuple[str, ...]) -> str:
    """RecurrentGemma's name of the parameter that `LM` calls `name`."""
    if not name.startswith("blocks."):
        return {"embed.weight": "model.embed_tokens.weight", "head.norm.weight": "model.final_norm.weight"}[name]
    _, index, rest = name.split(".", 2)
    if rest.startswith("mixer."):
        names, rest, prefix = _MIXER_NAMES[layers[int(index)]], rest.removeprefix("mixer."), "temporal_block."
    else:
        names, prefix = _BLOCK_NAMES, ""
    ours, theirs = next((ours, theirs) for ours, theirs in names.items() if rest.startswith(ours))
    return f"model.layers.{index}.{prefix}{theirs}{rest.removeprefix(ours)}"


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
