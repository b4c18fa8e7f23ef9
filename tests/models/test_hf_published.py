"""The shapes of published models, on the meta device: their classes' own parameters are those that Rondo maps to."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import load_config
from models.hf.fla_models import GATED_DELTANET, HGRN2
from models.hf.formats import Format
from models.hf.loading import import_without
from models.hf.olmo_hybrid import OLMO_HYBRID, OWN_NAMES
from models.hf.recurrentgemma import RECURRENTGEMMA
from models.hf.weights import parameter_shapes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

RECURRENTGEMMA_2B = {
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 15360,
    "logits_soft_cap": 30.0,
    "lru_width": 2560,
    "model_type": "recurrent_gemma",
    "num_attention_heads": 10,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
"""The keys of google/recurrentgemma-2b's config.json."""

SIZE_9B = {"hidden_size": 4096, "lru_width": 4096, "intermediate_size": 24576, "num_attention_heads": 16}
"""Of google-deepmind/recurrentgemma's preset RECURRENT_GEMMA_9B_V1, which has 38 layers."""

OLMO_HYBRID_7B = {
    "model_type": "olmo_hybrid",
    "vocab_size": 100352,
    "hidden_size": 3840,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 30,
    "num_key_value_heads": 30,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8,
    "linear_num_key_heads": 30,
    "linear_num_value_heads": 30,
    "linear_key_head_dim": 96,
    "linear_value_head_dim": 192,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": None},
}
"""As allenai's own tools give allenai/Olmo-Hybrid-7B."""

HGRN2_1P3B = {"model_type": "hgrn2", "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000}
"""fla-hub/hgrn2-1.3B-100B: 244 tensors."""

GATED_DELTANET_1P3B = {
    "model_type": "gated_deltanet",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 8,
    "head_dim": 256,
    "expand_v": 1,
    "vocab_size": 32000,
}
"""m-a-p/1.3B-100B-GatedDeltaNet-pure: 435 tensors, and 24 `attn.D` that nothing is computed with."""

PUBLISHED: dict[str, tuple[Format, dict[str, Any]]] = {
    "recurrentgemma_2b": (RECURRENTGEMMA, RECURRENTGEMMA_2B),
    "recurrentgemma_9b": (RECURRENTGEMMA, RECURRENTGEMMA_2B | SIZE_9B | {"num_hidden_layers": 38}),
    "olmo_hybrid_7b": (OLMO_HYBRID, OLMO_HYBRID_7B),
    "hgrn2_1p3b": (HGRN2, HGRN2_1P3B),
    "gated_deltanet_1p3b": (GATED_DELTANET, GATED_DELTANET_1P3B),
}
PARAMETERS = {
    "recurrentgemma_2b": 2_682_862_080,
    "recurrentgemma_9b": 8_579_977_216,
    "olmo_hybrid_7b": 7_430_870_688,
    "hgrn2_1p3b": 1_364_396_032,
    "gated_deltanet_1p3b": 1_466_343_808,
}
TENSORS = {"hgrn2_1p3b": 244, "gated_deltanet_1p3b": 435}


def class_of(name: str, values: dict[str, Any]) -> Any:
    if name.startswith("recurrentgemma"):
        from transformers import RecurrentGemmaForCausalLM as model_class
    elif name.startswith("olmo"):
        modeling = import_without("transformers.models.olmo_hybrid.modeling_olmo_hybrid", "fla", "causal_conv1d")
        model_class = modeling.OlmoHybridForCausalLM
    else:
        import fla.models

        model_class = getattr(fla.models, PUBLISHED[name][0].architecture)
    config_class = model_class.config_class
    with torch.device("meta"):
        return model_class(config_class.from_dict({**values, "pad_token_id": None}))


def test_the_blocks_that_a_configuration_names_count() -> None:
    """RecurrentGemma's class reads `block_types`, and ignores the key that stands in the published file."""
    assert RECURRENTGEMMA.model_config is not None
    values = RECURRENTGEMMA_2B | {"_block_types": ["recurrent", "attention"]}
    assert RECURRENTGEMMA.model_config(values).layers == ("rglru", "local_attention") * 13


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_class_s_own(name: str) -> None:
    stored_as, values = PUBLISHED[name]
    assert stored_as.model_config is not None
    config = stored_as.model_config(values)
    layout = OWN_NAMES.tensors if stored_as is OLMO_HYBRID else stored_as.tensors
    ours = {tensor.name: tensor.shape for tensor in layout(config, parameter_shapes(config))}
    model = class_of(name, values)
    theirs = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    if config.tie_embeddings:
        theirs.pop("lm_head.weight", None)
    assert ours == theirs
    assert config.num_params() == sum(torch.Size(shape).numel() for shape in ours.values())
    assert config.num_params() == PARAMETERS[name]
    assert len(ours) == TENSORS.get(name, len(ours))
    assert stored_as.fits(config) == []


@pytest.mark.parametrize("name", ["recurrentgemma_2b", "recurrentgemma_9b", "olmo_hybrid_7b"])
def test_the_configs_are_the_published_models(name: str) -> None:
    stored_as, values = PUBLISHED[name]
    assert stored_as.model_config is not None
    assert load_config(CONFIGS / f"{name}.yaml").model == stored_as.model_config(values)
