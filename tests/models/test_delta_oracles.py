"""Our Gated DeltaNet models against those that nobody here wrote: transformers' OlmoHybrid, mixer, blocks and whole
model, and flash-linear-attention's GatedDeltaNet, with the same weights: outputs and all gradients, packed or not."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import AttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from models.mlp import MLPConfig
from ops import Layout

TOLERANCE = 1e-4
ROWS, LENGTH, VOCABULARY, WIDTH = 2, 70, 61, 32
DOCUMENTS = {"unpacked": (LENGTH,), "packed": (1, 6, 1, 33, 29)}

BASE = ModelConfig(
    vocab_size=VOCABULARY,
    width=WIDTH,
    layers=("gated_deltanet", "gated_deltanet", "attention", "gated_deltanet"),
    mixers=MixerConfigs(
        gated_deltanet=GatedDeltaNetConfig(
            heads=2, value_heads=4, head_dim=8, expand_v=1.5, negative_eigenvalues=True, norm_eps=1e-5
        ),
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm="full", qk_norm_eps=1e-6),
    ),
    mlp=MLPConfig(width=44, activation="silu", bias=False),
    norm_eps=1e-6,
    norm_one_plus_weight=False,
    post_norm=("attention",),
    tie_embeddings=False,
    scale_embeddings=False,
    logit_soft_cap=None,
)


def other_settings() -> ModelConfig:
    """As many value heads as heads, beta below 1, no rotation, three taps."""
    mixer = GatedDeltaNetConfig(heads=2, head_dim=16, expand_v=0.5, conv_width=3)
    attention = replace(BASE.mixer("attention"), rotary_fraction=0.0)
    return replace(BASE, mixers=MixerConfigs(gated_deltanet=mixer, attention=attention))


def fla_settings(**mixer: Any) -> ModelConfig:
    """It has one eps for all norms."""
    settings = replace(BASE.mixer("gated_deltanet"), **mixer)
    mixers = MixerConfigs(gated_deltanet=settings)
    return replace(BASE, layers=("gated_deltanet",) * 2, mixers=mixers, post_norm=(), norm_eps=1e-5)


def olmo_config(config: ModelConfig) -> dict[str, Any]:
    mixer: GatedDeltaNetConfig = config.mixer("gated_deltanet")
    attention: AttentionConfig = config.mixer("attention")
    theta = attention.rotary_theta if attention.rotary_dim else None
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "layer_types": ["full_attention" if kind == "attention" else "linear_attention" for kind in config.layers],
        "linear_num_key_heads": mixer.heads,
        "linear_num_value_heads": mixer.num_value_heads,
        "linear_key_head_dim": mixer.head_dim,
        "linear_value_head_dim": mixer.value_dim,
        "linear_conv_kernel_dim": mixer.conv_width,
        "linear_allow_neg_eigval": mixer.negative_eigenvalues,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def fla_config(config: ModelConfig) -> dict[str, Any]:
    mixer: GatedDeltaNetConfig = config.mixer("gated_deltanet")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp.width,
        "num_hidden_layers": len(config.layers),
        "num_heads": mixer.heads,
        "num_v_heads": mixer.value_heads,
        "head_dim": mixer.head_dim,
        "expand_v": mixer.expand_v,
        "use_gate": mixer.output_gate,
        "use_short_conv": mixer.conv_width is not None,
        "conv_size": mixer.conv_width,
        "conv_bias": mixer.conv_bias,
        "allow_neg_eigval": mixer.negative_eigenvalues,
        "norm_eps": mixer.norm_eps,
    }


DELTA_NAMES = {
    "decay_proj.weight": "a_proj.weight",
    "beta_proj.weight": "b_proj.weight",
    "gate_proj.weight": "g_proj.weight",
    "norm.weight": "o_norm.weight",
    "conv.weight": "conv1d.weight",
    "conv.bias": "conv1d.bias",
}
MODEL_NAMES = {
    "olmo_hybrid": {"embed": "model.embed_tokens", "head.norm": "model.norm", "head": "lm_head"},
    "gated_deltanet": {"embed": "model.embeddings", "head.norm": "model.norm", "head": "lm_head"},
}
BLOCK_NAMES = {  # mixer, the norm beside it, the norm beside the MLP
    ("olmo_hybrid", "gated_deltanet"): ("linear_attn", "input_layernorm", "post_attention_layernorm"),
    ("olmo_hybrid", "attention"): ("self_attn", "post_attention_layernorm", "post_feedforward_layernorm"),
    ("gated_deltanet", "gated_deltanet"): ("attn", "attn_norm", "mlp_norm"),
}


def their_name(project: str, name: str, layers: tuple[str, ...]) -> str:
    if not name.startswith("blocks."):
        module, leaf = name.rsplit(".", 1)
        return f"{MODEL_NAMES[project][module]}.{leaf}"
    _, index, part, rest = name.split(".", 3)
    kind = layers[int(index)]
    mixer, mixer_norm, mlp_norm = BLOCK_NAMES[project, kind]
    if part == "mlp":
        rest = rest.replace(".", "_proj.")
    elif part == "mixer" and kind == "gated_deltanet":
        rest = DELTA_NAMES.get(rest, rest)
    part = {"mixer": mixer, "mixer_norm": mixer_norm, "mlp_norm": mlp_norm, "mlp": "mlp"}[part]
    return f"model.layers.{index}.{part}.{rest}"


def renamed(project: str, tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights or gradients under a project's names; one fused convolution becomes theirs, fused or one of three."""
    mixer: GatedDeltaNetConfig = config.mixer("gated_deltanet")
    keys = mixer.heads * mixer.head_dim
    found = {}
    for name, tensor in tensors.items():
        there = their_name(project, name, config.layers)
        if "conv1d" not in there:
            found[there] = tensor
            continue
        rows = tensor.unsqueeze(1) if there.endswith("weight") else tensor
        if project == "olmo_hybrid":
            found[there] = rows
            continue
        for letter, part in zip("qkv", rows.split([keys, keys, len(tensor) - 2 * keys])):
            found[there.replace("conv1d", f"{letter}_conv1d")] = part
    return found


@dataclass(frozen=True)
class Case:
    project: str
    config: ModelConfig
    part: str
    layer: int
    packing: str

    def model(self) -> LM:
        """Weights far from their initial values."""
        model = LM(self.config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        return model

    def request(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        shape = (ROWS, LENGTH)
        weights = {name: p.detach() for name, p in self.model().named_parameters()}
        hidden, ids = torch.randn((*shape, WIDTH), generator=generator), torch.randint(61, shape, generator=generator)
        features = VOCABULARY if self.part == "lm" else WIDTH
        return {
            "config": (olmo_config if self.project == "olmo_hybrid" else fla_config)(self.config),
            "weights": renamed(self.project, weights, self.config),
            "part": self.part,
            "layer": self.layer,
            "documents": DOCUMENTS[self.packing],
            "x": ids if self.part == "lm" else hidden,
            "cotangent": torch.randn((*shape, features), generator=generator),
        }

    def ours(self) -> dict[str, Tensor]:
        model, request = self.model(), self.request()
        positions = torch.cat([torch.arange(n) for n in request["documents"]]).repeat(ROWS, 1)
        x: Tensor = request["x"]
        if self.part == "lm":
            output, _ = model(x, positions)
        else:
            x.requires_grad_()
            block = model.blocks[self.layer]
            output, _ = (block if self.part == "block" else block.mixer)(x, Layout(positions))
        (output * request["cotangent"]).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        theirs = {f"d {name}": grad for name, grad in renamed(self.project, gradients, self.config).items()}
        return {"output": output.detach(), **theirs} | ({} if x.grad is None else {"d x": x.grad})


def cases() -> dict[str, Case]:
    olmo = "olmo_hybrid"
    parts = {"mixer": ("mixer", 1), "delta-block": ("block", 1), "attention-block": ("block", 2), "lm": ("lm", 0)}
    found = {f"{olmo}-{name}": (olmo, BASE, *part) for name, part in parts.items()}
    found[f"{olmo}-other"] = (olmo, other_settings(), "lm", 0)
    switches: dict[str, dict[str, Any]] = {
        "lm": {},
        "no-gate": {"output_gate": False},
        "no-conv": {"conv_width": None},
        "conv-bias": {"conv_bias": True, "conv_width": 3},
    }
    for name, settings in switches.items():
        found[f"gated_deltanet-{name}"] = ("gated_deltanet", fla_settings(**settings), "lm", 0)
    return {f"{name}-{packing}": Case(*case, packing) for name, case in found.items() for packing in DOCUMENTS}


CASES = cases()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each project answers to its cases, from one process a project."""
    directory, answers = tmp_path_factory.mktemp("oracles"), {}
    for project in ("olmo_hybrid", "gated_deltanet"):
        mine = {name: case for name, case in CASES.items() if case.project == project}
        request, answer = directory / f"{project}.request", directory / f"{project}.answer"
        torch.save([case.request() for case in mine.values()], request)
        script = Path(__file__).with_name("delta_oracles.py")
        run = subprocess.run(
            [sys.executable, script, project, request, answer], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-3000:]
        answers |= dict(zip(mine, torch.load(answer)))
    return answers


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        assert scale > 0, f"{name} is zero everywhere: nothing is compared"
        assert (found[name] - tensor).abs().max().item() <= TOLERANCE * scale, name


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_all_gradients(name: str, theirs: dict[str, dict[str, Tensor]]) -> None:
    found = CASES[name].ours()
    assert len(found) > 10
    assert_close(found, theirs[name])


MUTANTS = {
    "pre-norm attention": replace(BASE, post_norm=()),
    "post-norm recurrence": replace(BASE, post_norm=("attention", "gated_deltanet")),
    "no rotation": replace(BASE, mixers=replace(BASE.mixers, attention=other_settings().mixer("attention"))),
    "beta below 1": replace(
        BASE,
        mixers=replace(BASE.mixers, gated_deltanet=replace(BASE.mixer("gated_deltanet"), negative_eigenvalues=False)),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees_the_settings(mutant: str, theirs: dict[str, dict[str, Tensor]]) -> None:
    name = "olmo_hybrid-lm-packed"
    with pytest.raises(AssertionError, match="output"):
        assert_close(replace(CASES[name], config=MUTANTS[mutant]).ours(), theirs[name])
