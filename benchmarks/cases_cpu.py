"""On a CPU, fp32, one thread: our chunked forms against time loops and other projects' torch forms."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RecurrentGemmaForCausalLM

from benchmarks import work
from benchmarks.inputs import Inputs
from benchmarks.measure import Case, Contender, Work
from models.config import ModelConfig
from models.hf.recurrentgemma import to_hf_config, to_hf_weights
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import LocalAttentionConfig
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig
from ops import (
    Layout,
    attention,
    causal_conv1d,
    diagonal_gru,
    diagonal_lstm,
    gated_delta_rule,
    gated_linear_attention,
    linear_cross_entropy,
    linear_scan,
    rms_norm,
)

FP32 = 4
CHUNK = 32
"""Tokens of a chunk in the floors' arithmetic: what is best on a CPU."""
TOLERANCE = 1e-4


def form(op: Callable[..., Any], impl: str) -> Contender:
    """An op as a function of its tensors to its output."""
    return lambda **tensors: op(**tensors, impl=impl)[0]


def recurrence(name: str, op: Callable[..., Any], inputs: dict[str, Tensor], works: tuple[Work, Work]) -> Case:
    return Case(
        name=name,
        inputs=inputs,
        oracle=form(op, "reference"),
        contenders={"chunked": form(op, "chunked"), "time loop": form(op, "reference")},
        tolerance=TOLERANCE,
        forward=works[0],
        backward=works[1],
    )


def cases(small: bool) -> list[Case]:
    """The shapes of docs/performance.md, or with `small` a rehearsal in seconds."""
    time = 70 if small else 2048
    draw = Inputs(torch.device("cpu"), torch.float32)
    return [
        recurrence(
            f"linear_scan B4 T{time} D512",
            linear_scan,
            draw.scan(4, time, 512),
            work.linear_scan(4 * time * 512, FP32, FP32),
        ),
        recurrence(
            f"gated_linear_attention B2 T{time} H4 K64 V64",
            gated_linear_attention,
            draw.linear_attention(2, time, 4, 64, 64),
            work.gated_linear_attention(2 * time * 4, 64, 64, CHUNK, FP32, FP32),
        ),
        *(delta_rule(draw, time, width) for width in (64, 128)),
        full_attention(draw, time, 4, time),
        full_attention(draw, time, 1, time // 4),
        recurrence(
            f"diagonal_lstm B4 T{time} D256",
            diagonal_lstm,
            draw.lstm(4, time, 256),
            work.diagonal_lstm(4 * time * 256, FP32),
        ),
        recurrence(
            f"diagonal_gru B4 T{time} D256",
            diagonal_gru,
            draw.gru(4, time, 256),
            work.diagonal_gru(4 * time * 256, FP32),
        ),
        rglru_layer(draw, time),
        convolution(draw, time),
        norm(draw, time),
        cross_entropy(draw, 256 if small else 2048),
    ]


def full_attention(draw: Inputs, time: int, groups: int, document: int) -> Case:
    """Rows of documents of the same length: one, or some."""
    layout = None if document == time else Layout((torch.arange(time) % document).repeat(2, 1))
    works = work.attention(2 * time * (document + 1) // 2, 2 * time, groups, 4, 64, FP32)

    def run(impl: str) -> Contender:
        return lambda q, k, v: attention(q, k, v, layout=layout, impl=impl)[0]

    return Case(
        name=f"attention B2 T{time} H4 G{groups} K64, documents of {document}",
        inputs=draw.attention(2, time, 4, groups, 64),
        oracle=run("reference"),
        contenders={"chunked": run("chunked"), "torch": run("sdpa")},
        tolerance=TOLERANCE,
        forward=works[0],
        backward=works[1],
    )


def delta_rule(draw: Inputs, time: int, width: int) -> Case:
    works = work.gated_delta_rule(2 * time * 4, width, width, CHUNK, FP32, FP32)
    return Case(
        name=f"gated_delta_rule B2 T{time} H4 K{width} V{width}",
        inputs=draw.delta_rule(2, time, 4, width, width),
        oracle=form(gated_delta_rule, "reference"),
        contenders={"chunked": form(gated_delta_rule, "chunked"), "transformers": transformers_delta_rule()},
        tolerance=TOLERANCE,
        forward=works[0],
        backward=works[1],
    )


class WithoutFla:
    """An import finder for which flash-linear-attention is not installed: with it transformers' delta-rule models ask
    for a GPU when imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "fla":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def transformers_delta_rule() -> Contender:
    """The torch chunk form of transformers' OlmoHybrid."""
    sys.meta_path.insert(0, WithoutFla())
    try:
        from transformers.models.olmo_hybrid.modeling_olmo_hybrid import torch_chunk_gated_delta_rule as theirs
    finally:
        sys.meta_path.pop(0)
    return lambda q, k, v, log_decay, beta: theirs(q, k, v, log_decay, beta)[0]


def rglru_layer(draw: Inputs, time: int) -> Case:
    """The recurrent block of Griffin, width 512, beside transformers' RecurrentGemma with the same weights."""
    width, heads = 512, 8
    local = LocalAttentionConfig(
        heads=heads, kv_heads=1, head_dim=width // heads, window=32, rotary_fraction=0.5, output_bias=True
    )
    config = ModelConfig(
        vocab_size=8,
        width=width,
        layers=("rglru", "rglru", "local_attention"),
        mixers=MixerConfigs(rglru=RGLRUConfig(width=width, gate_blocks=heads), local_attention=local),
        mlp=MLPConfig(width=width),
    )
    model = LM(config)
    twin = RecurrentGemmaForCausalLM(to_hf_config(config, pad_token_id=None))
    twin.load_state_dict(to_hf_weights(dict(model.named_parameters()), config.layers), strict=False)
    mixer, block = model.blocks[0].mixer, twin.model.layers[0].temporal_block
    positions = torch.arange(time).expand(2, -1)

    def ours(impl: str) -> Contender:
        def run(x: Tensor) -> Tensor:
            mixer.core.impl = mixer.conv.core.impl = impl
            return mixer(x, Layout(positions))[0]

        return run

    elements = 2 * time * width
    scan = work.linear_scan(elements, FP32, FP32)
    others = Work(flops=2.0 * elements * (3 * width + 2 * width // heads), transcendentals=4 * elements)
    return Case(
        name=f"rglru layer B2 T{time} width {width}",
        inputs={"x": draw.normal(2, time, width)},
        oracle=ours("reference"),
        contenders={
            "chunked": ours("chunked"),
            "transformers": lambda x: block(x, positions, None, use_cache=False)[0],
        },
        tolerance=TOLERANCE,
        forward=scan[0] + others,
        backward=scan[1] + others,
    )


def convolution(draw: Inputs, time: int) -> Case:
    width, taps = 512, 4
    inputs = {"x": draw.normal(4, time, width), "weight": draw.normal(width, taps), "bias": draw.normal(width)}

    def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight[:, None], bias, groups=width)
        return F.silu(y).mT

    works = work.elementwise(4 * time * width, FP32)
    return Case(
        name=f"causal_conv1d B4 T{time} D{width} W{taps} silu",
        inputs=inputs,
        oracle=lambda **z: causal_conv1d(**z, activation="silu", impl="reference")[0],
        contenders={
            "chunked": lambda **z: causal_conv1d(**z, activation="silu", impl="chunked")[0],
            "torch": torch_conv,
        },
        tolerance=TOLERANCE,
        forward=works[0],
        backward=works[1],
    )


def norm(draw: Inputs, time: int) -> Case:
    width = 1024
    works = work.elementwise(2 * time * width, FP32)
    return Case(
        name=f"rms_norm M{2 * time} D{width}",
        inputs={"x": draw.normal(2 * time, width), "weight": draw.normal(width)},
        oracle=lambda x, weight: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight,
        contenders={
            "chunked": lambda x, weight: rms_norm(x, weight),
            "torch": lambda x, weight: F.rms_norm(x, (width,), weight, 1e-6),
        },
        tolerance=TOLERANCE,
        forward=works[0],
        backward=works[1],
    )


def cross_entropy(draw: Inputs, tokens: int) -> Case:
    width, vocabulary = 256, 8192
    labels = torch.arange(tokens) * 7 % vocabulary
    works = work.linear_cross_entropy(tokens, width, vocabulary)

    def logits(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), labels, reduction="none")

    return Case(
        name=f"linear_cross_entropy M{tokens} D{width} N{vocabulary}",
        inputs={"x": draw.normal(tokens, width), "weight": draw.normal(vocabulary, width) / 16},
        oracle=logits,
        contenders={"chunked": lambda x, weight: linear_cross_entropy(x, weight, labels)[0], "full logits": logits},
        tolerance=TOLERANCE,
        forward=works[0],
        backward=works[1],
    )
