"""Tiny instances of the Hugging Face classes that nobody here wrote, saved as these save themselves."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.hf.loading import import_without

VOCABULARY = 32
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
CLASSES = ("recurrentgemma", "olmo_hybrid", "fla_hgrn2", "fla_gated_deltanet", "fla_gated_deltanet_tied")


def save_instance(name: str, directory: Path) -> Path:
    """Weights far from their initial values: no norm is one, no bias zero, every tap counts."""
    torch.manual_seed(0)
    model = _build(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(directory)
    return directory


def _build(name: str) -> Any:
    if name == "recurrentgemma":
        from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

        settings = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_window_size": 8}
        return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**settings, pad_token_id=None))
    if name == "olmo_hybrid":
        from transformers import OlmoHybridConfig

        modeling = import_without("transformers.models.olmo_hybrid.modeling_olmo_hybrid", "fla", "causal_conv1d")
        ids = {"pad_token_id": None, "eos_token_id": None}
        settings = SIZES | ids | {"num_attention_heads": 4, "rope_parameters": {"rope_theta": None}}  # as published
        return modeling.OlmoHybridForCausalLM(OlmoHybridConfig(**settings))
    import fla.models

    if name == "fla_hgrn2":
        return fla.models.HGRN2ForCausalLM(fla.models.HGRN2Config(**SIZES, expand_ratio=8, use_short_conv=True))
    settings = SIZES | {"num_heads": 2, "head_dim": 8}
    if name == "fla_gated_deltanet_tied":
        settings |= {"num_v_heads": 4, "expand_v": 1.5, "allow_neg_eigval": True, "tie_word_embeddings": True}
    return fla.models.GatedDeltaNetForCausalLM(fla.models.GatedDeltaNetConfig(**settings))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All of a directory's tensors."""
    return {name: w for path in sorted(directory.glob("*.safetensors")) for name, w in load_file(path).items()}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))
