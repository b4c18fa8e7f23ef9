"""HGRN2 and Gated DeltaNet models as flash-linear-attention's `HGRN2ForCausalLM` and `GatedDeltaNetForCausalLM`.

Its layers need a GPU with Triton, so a directory is checked through that library's naive recurrences instead
(`models/hf/fla_check.py`). Its configuration classes would be imported with the kernels; what they mean is stated here:
the settings that were left out, and those that Rondo has no counterpart of.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.hf.delta_conv import split_convolution
from models.hf.fla_check import load_naive
from models.hf.formats import Format, Loaded, Names, Requirement, TokenIds, obstacles
from models.hf.loading import require
from models.mixers import MixerConfigs
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from models.mixers.hgrn2 import HGRN2Config
from models.mlp import MLPConfig

HGRN2_NORM_EPS = 1e-5
"""Of the norm before HGRN2's output map, fixed in the layer whatever `norm_eps` says."""

_OUTER = {
    "embed.weight": "model.embeddings.weight",
    "head.norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "shared.hgrn2.lower_bounds": "model.lower_bounds",
}
_BLOCK = {
    "mixer_norm": "attn_norm",
    "mlp_norm": "mlp_norm",
    "mixer.": "attn.",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_HGRN2 = {"mixer.norm": "attn.g_norm"} | {f"mixer.{letter}_conv": f"attn.{letter}_conv1d" for letter in "qfi"}
_DELTA = {
    "mixer.decay_proj": "attn.a_proj",
    "mixer.beta_proj": "attn.b_proj",
    "mixer.gate_proj": "attn.g_proj",
    "mixer.norm": "attn.o_norm",
    "mixer.conv": "attn.{}_conv1d",
}
NAMES = Names(outer=_OUTER, blocks={"hgrn2": _BLOCK | _HGRN2, "gated_deltanet": _BLOCK | _DELTA})


def _block_requirements(config: ModelConfig, kind: str) -> Iterator[Requirement]:
    """What both classes have in common."""
    foreign = tuple(sorted(set(config.layers) - {kind}))
    yield "model.layers", foreign, not foreign, f"layers of {kind} alone"
    yield "model.post_norm", config.post_norm, not config.post_norm, "none, its blocks normalise inputs"
    plain = not config.norm_one_plus_weight
    yield "model.norm_one_plus_weight", config.norm_one_plus_weight, plain, "false"
    yield "model.scale_embeddings", config.scale_embeddings, not config.scale_embeddings, "false"
    yield "model.logit_soft_cap", config.logit_soft_cap, config.logit_soft_cap is None, "null"
    yield "model.mlp.activation", config.mlp.activation, config.mlp.activation == "silu", "silu"
    yield "model.mlp.bias", config.mlp.bias, not config.mlp.bias, "false"


def _hgrn2_requirements(config: ModelConfig) -> Iterator[Requirement]:
    yield from _block_requirements(config, "hgrn2")
    if "hgrn2" in config.layers:
        mixer: HGRN2Config = config.mixer("hgrn2")
        _, keys, values = mixer.head_shape(config.width)
        key = "model.mixers.hgrn2"
        yield f"{key}.expand_ratio", keys, keys == values, f"as many key as value features of a head, {values}"
        yield f"{key}.conv_bias", mixer.conv_bias, not mixer.conv_bias, "false"
        yield f"{key}.norm_eps", mixer.norm_eps, mixer.norm_eps == HGRN2_NORM_EPS, f"{HGRN2_NORM_EPS}"


def _delta_requirements(config: ModelConfig) -> Iterator[Requirement]:
    yield from _block_requirements(config, "gated_deltanet")
    if "gated_deltanet" in config.layers:
        mixer: GatedDeltaNetConfig = config.mixer("gated_deltanet")
        key = "model.mixers.gated_deltanet"
        yield f"{key}.conv_bias", mixer.conv_bias, not mixer.conv_bias, "false"
        yield f"{key}.norm_eps", mixer.norm_eps, mixer.norm_eps == config.norm_eps, f"norm_eps, {config.norm_eps}"


def _common_json(config: ModelConfig, ids: TokenIds, model_type: str, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "intermediate_size": config.mlp.width,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_mode": "chunk",
        "use_cache": True,
    } | ids._asdict()


def _hgrn2_json(config: ModelConfig, ids: TokenIds) -> dict[str, Any]:
    mixer: HGRN2Config = config.mixer("hgrn2")
    heads, keys, _ = mixer.head_shape(config.width)
    return _common_json(config, ids, "hgrn2", "HGRN2ForCausalLM") | {
        "num_heads": heads,
        "expand_ratio": keys,
        "use_lower_bound": mixer.num_shared_params(config.width, len(config.layers)) > 0,
        "use_short_conv": mixer.conv_width is not None,
        "conv_size": mixer.conv_width or 4,
    }


def _delta_json(config: ModelConfig, ids: TokenIds) -> dict[str, Any]:
    mixer: GatedDeltaNetConfig = config.mixer("gated_deltanet")
    return _common_json(config, ids, "gated_deltanet", "GatedDeltaNetForCausalLM") | {
        "num_heads": mixer.heads,
        "num_v_heads": mixer.value_heads,
        "head_dim": mixer.head_dim,
        "expand_v": mixer.expand_v,
        "use_gate": mixer.output_gate,
        "use_short_conv": mixer.conv_width is not None,
        "conv_size": mixer.conv_width or 4,
        "allow_neg_eigval": mixer.negative_eigenvalues,
    }


DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "norm_eps": 1e-6,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "intermediate_size": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "conv_size": 4,
    "attn": None,
    "attnres_block_size": None,
}
"""What flash-linear-attention takes where `config.json` says nothing (0.6.0), of both classes and of each."""

HGRN2_DEFAULTS = DEFAULTS | {
    "num_hidden_layers": 24,
    "num_heads": None,
    "expand_ratio": 128,
    "use_short_conv": False,
    "use_lower_bound": True,
    "elementwise_affine": True,
}
DELTA_DEFAULTS = DEFAULTS | {
    "num_hidden_layers": 21,
    "expand_v": 2.0,
    "use_gate": True,
    "use_short_conv": True,
    "allow_neg_eigval": False,
    "head_dim": 256,
    "num_heads": 6,
    "num_v_heads": None,
    "output_gate_activation": "swish",
}


def _common_config(theirs: Mapping[str, Any], kind: str, mixer: Any) -> ModelConfig:
    require("hidden_act", theirs["hidden_act"], theirs["hidden_act"] == "swish", "swish")
    for key in ("attn", "attnres_block_size"):
        require(key, theirs[key], theirs[key] is None, "null: no attention layers or residuals among the others")
    width = theirs["hidden_size"]
    hidden = theirs["intermediate_size"]
    if hidden is None:  # the multiple of 256 at or above 2/3 of hidden_ratio widths
        ratio = 4 if theirs["hidden_ratio"] is None else theirs["hidden_ratio"]
        hidden = 256 * -(-int(width * ratio * 2 / 3) // 256)
    return ModelConfig(
        vocab_size=theirs["vocab_size"],
        width=width,
        layers=(kind,) * theirs["num_hidden_layers"],
        mixers=MixerConfigs(**{kind: mixer}),
        mlp=MLPConfig(width=hidden, activation="silu", bias=False),
        norm_eps=theirs["norm_eps"],
        norm_one_plus_weight=False,
        tie_embeddings=theirs["tie_word_embeddings"],
        scale_embeddings=False,
        logit_soft_cap=None,
    )


def _hgrn2_config(values: Mapping[str, Any]) -> ModelConfig:
    theirs = HGRN2_DEFAULTS | dict(values)
    affine, bounded, depth = theirs["elementwise_affine"], theirs["use_lower_bound"], theirs["num_hidden_layers"]
    require("elementwise_affine", affine, affine is not False, "true")
    require("use_lower_bound", bounded, not bounded or depth > 1, "false in a single layer, whose bound is 0")
    ratio = theirs["expand_ratio"]  # the layer takes it before num_heads
    mixer = HGRN2Config(
        heads=theirs["num_heads"] if ratio is None else theirs["hidden_size"] // ratio,
        lower_bound=bounded,
        conv_width=theirs["conv_size"] if theirs["use_short_conv"] else None,
        norm_eps=HGRN2_NORM_EPS,
    )
    return _common_config(theirs, "hgrn2", mixer)


def _delta_config(values: Mapping[str, Any]) -> ModelConfig:
    theirs = DELTA_DEFAULTS | dict(values)
    activation = theirs["output_gate_activation"]
    require("output_gate_activation", activation, activation in ("swish", "silu"), "swish")
    mixer = GatedDeltaNetConfig(
        heads=theirs["num_heads"],
        value_heads=theirs["num_v_heads"],
        head_dim=theirs["head_dim"],
        expand_v=float(theirs["expand_v"]),
        conv_width=theirs["conv_size"] if theirs["use_short_conv"] else None,
        output_gate=theirs["use_gate"],
        negative_eigenvalues=theirs["allow_neg_eigval"],
        norm_eps=theirs["norm_eps"],
    )
    return _common_config(theirs, "gated_deltanet", mixer)


def _load(directory: Path) -> Loaded:
    return load_naive(directory)


LIBRARY = "flash-linear-attention 0.6 or later and a GPU"
NOTES = (
    "`import fla.models` makes the class known to transformers; its layers run on a GPU.",
    "Parameters get the dtype they are loaded with: `dtype=torch.float32` and autocast keep the decays in fp32.",
)

HGRN2 = Format(
    name="fla_hgrn2",
    model_type="hgrn2",
    architecture="HGRN2ForCausalLM",
    library=LIBRARY,
    fits=lambda config: obstacles("flash-linear-attention's HGRN2", _hgrn2_requirements(config)),
    config_json=_hgrn2_json,
    tensors=NAMES.tensors,
    model_config=_hgrn2_config,
    load_for_check=_load,
    notes=NOTES,
)
GATED_DELTANET = Format(
    name="fla_gated_deltanet",
    model_type="gated_deltanet",
    architecture="GatedDeltaNetForCausalLM",
    library=LIBRARY,
    fits=lambda config: obstacles("flash-linear-attention's GatedDeltaNet", _delta_requirements(config)),
    config_json=_delta_json,
    tensors=split_convolution(NAMES.tensors),
    unused=(".attn.D",),  # until March 2025
    model_config=_delta_config,
    load_for_check=_load,
    notes=NOTES,
)
