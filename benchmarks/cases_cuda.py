"""On a GPU, bf16: our Triton kernels against flash-linear-attention's, torch's own and sequential fused kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import work
from benchmarks.inputs import Inputs
from benchmarks.measure import Case, Contender, Work
from ops import (
    attention,
    causal_conv1d,
    diagonal_gru,
    diagonal_lstm,
    gated_delta_rule,
    gated_linear_attention,
    linear_cross_entropy,
    linear_scan,
    local_attention,
    rms_norm,
    rotary,
)

BF16, FP32 = 2, 4
CHUNK = 64
BF16_TOLERANCE, FP32_TOLERANCE = 2e-2, 1e-4


def form(op: Callable[..., Any], impl: str, **options: Any) -> Contender:
    """An op as a function of its tensors to its output."""
    return lambda **tensors: op(**tensors, **options, impl=impl)[0]


@dataclass(frozen=True)
class Shapes:
    """Rows, tokens a row, and widths of what is measured; `peers` are other projects' kernels, which no CPU runs."""

    batch: int
    time: int
    channels: tuple[int, ...]
    heads: int
    head_dim: int
    cells: tuple[int, ...]
    width: int
    loss: tuple[int, int, int]
    peers: bool


FULL = Shapes(8, 4096, (2560, 4096), 16, 128, (256, 2048), 4096, (8192, 4096, 128256), True)
"""32,768 tokens: the shapes of docs/performance.md."""

FEW_TOKENS = Shapes(1, 130, (2560,), 2, 128, (256,), 4096, (64, 4096, 32000), False)
"""The same widths, for compiling without a GPU."""

REHEARSAL = Shapes(1, 70, (64,), 2, 16, (32,), 64, (40, 32, 50), False)
"""For a CPU, where our kernels run interpreted."""


def cases(device: torch.device, shapes: Shapes) -> list[Case]:
    draw = Inputs(device, torch.bfloat16)
    batch, time, heads, keys, peers = shapes.batch, shapes.time, shapes.heads, shapes.head_dim, shapes.peers
    return [
        *(scan(draw, batch, time, channels, peers) for channels in shapes.channels),
        linear_attention(draw, batch, time, heads, keys, peers),
        *(delta_rule(draw, batch, time, heads, keys, values, peers) for values in (keys, 2 * keys)),
        *(lstm(device, batch, time, channels) for channels in shapes.cells),
        gru(device, batch, time, shapes.cells[-1]),
        *(softmax_attention(draw, batch, time, heads, keys, window, peers) for window in (None, time // 4)),
        convolution(draw, batch, time, shapes.width, peers),
        norm(draw, batch * time, shapes.width, peers),
        rotation(draw, batch, time, heads, keys, peers),
        cross_entropy(draw, *shapes.loss, peers),
    ]


def case(
    name: str,
    op: Callable[..., Any],
    inputs: dict[str, Tensor],
    works: tuple[Work, Work],
    others: dict[str, Contender],
    *,
    tolerance: float = BF16_TOLERANCE,
    forward_only: tuple[str, ...] = (),
) -> Case:
    """The gate holds all against our torch form in fp32, which the tests hold against the time loop."""
    return Case(
        name=name,
        inputs=inputs,
        oracle=form(op, "chunked"),
        contenders={"triton": form(op, "triton"), **others},
        tolerance=tolerance,
        forward=works[0],
        backward=works[1],
        forward_only=forward_only,
    )


def scan(draw: Inputs, batch: int, time: int, width: int, peers: bool) -> Case:
    others: dict[str, Contender] = {}
    if peers:
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

        others = {
            "fla chunk_hgrn": lambda x, log_decay: chunk_hgrn(x, log_decay)[0],
            "fla fused_recurrent_hgrn": lambda x, log_decay: fused_recurrent_hgrn(x, log_decay)[0],
        }
    works = work.linear_scan(batch * time * width, BF16, FP32)
    name = f"linear_scan B{batch} T{time} D{width}"
    return case(name, linear_scan, draw.scan(batch, time, width), works, others)


def linear_attention(draw: Inputs, batch: int, time: int, heads: int, width: int, peers: bool) -> Case:
    others: dict[str, Contender] = {}
    if peers:
        from fla.ops.gla import chunk_gla, fused_recurrent_gla

        others = {
            "fla chunk_gla": lambda q, k, v, log_decay: chunk_gla(q, k, v, log_decay)[0],
            "fla fused_recurrent_gla": lambda q, k, v, log_decay: fused_recurrent_gla(q, k, v, gk=log_decay)[0],
        }
    works = work.gated_linear_attention(batch * time * heads, width, width, CHUNK, BF16, FP32)
    name = f"gated_linear_attention B{batch} T{time} H{heads} K{width} V{width}"
    inputs = draw.linear_attention(batch, time, heads, width, width)
    return case(name, gated_linear_attention, inputs, works, others)


def delta_rule(draw: Inputs, batch: int, time: int, heads: int, keys: int, values: int, peers: bool) -> Case:
    others: dict[str, Contender] = {}
    if peers:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

        others = {
            "fla chunk": lambda q, k, v, log_decay, beta: chunk_gated_delta_rule(q, k, v, log_decay, beta)[0],
            "fla fused_recurrent": lambda q, k, v, log_decay, beta: fused_recurrent_gated_delta_rule(
                q, k, v, log_decay, beta
            )[0],
        }
    works = work.gated_delta_rule(batch * time * heads, keys, values, CHUNK, BF16, BF16)
    name = f"gated_delta_rule B{batch} T{time} H{heads} K{keys} V{values}"
    inputs = draw.delta_rule(batch, time, heads, keys, values)
    return case(name, gated_delta_rule, inputs, works, others, forward_only=("fla fused_recurrent",))


def lstm(device: torch.device, batch: int, time: int, width: int) -> Case:
    """fp32. `sequential` is the kernel that runs one segment, whatever the shape."""
    inputs = Inputs(device, torch.float32).lstm(batch, time, width)
    works = work.diagonal_lstm(batch * time * width, FP32)
    others = {"sequential": form(diagonal_lstm, "triton", segments=1)}
    name = f"diagonal_lstm B{batch} T{time} D{width} fp32"
    return case(name, diagonal_lstm, inputs, works, others, tolerance=FP32_TOLERANCE)


def gru(device: torch.device, batch: int, time: int, width: int) -> Case:
    inputs = Inputs(device, torch.float32).gru(batch, time, width)
    works = work.diagonal_gru(batch * time * width, FP32)
    name = f"diagonal_gru B{batch} T{time} D{width} fp32"
    others = {"sequential": form(diagonal_gru, "triton", segments=1)}
    return case(name, diagonal_gru, inputs, works, others, tolerance=FP32_TOLERANCE)


def softmax_attention(
    draw: Inputs, batch: int, time: int, heads: int, width: int, window: int | None, peers: bool
) -> Case:
    """Full or local. Grouped queries, 4 heads a key. No kernel of it is ours: "sdpa" is what `auto` takes on an
    unmeasured device."""
    groups = max(1, heads // 4)
    seen = time if window is None else window
    pairs = batch * (seen * (seen + 1) // 2 + (time - seen) * seen)
    op, options = (attention, {}) if window is None else (local_attention, {"window": window})
    names = ["sdpa", "chunked"]
    if peers:
        names += ["flex", "fla", *(["flash_attn"] if find_spec("flash_attn") else [])]
    forward, backward = work.attention(pairs, batch * time, groups, heads, width, BF16)
    return Case(
        name=f"{op.__name__} B{batch} T{time} H{heads} G{groups} K{width}" + (f" W{window}" if window else ""),
        inputs=draw.attention(batch, time, heads, groups, width),
        oracle=form(op, "chunked", **options),
        contenders={name: form(op, name, **options) for name in names},
        tolerance=BF16_TOLERANCE,
        forward=forward,
        backward=backward,
    )


def rotation(draw: Inputs, batch: int, time: int, heads: int, width: int, peers: bool) -> Case:
    positions = torch.arange(time, device=draw.device).repeat(batch, 1)

    def run(impl: str) -> Contender:
        return lambda x: rotary(x, positions, impl=impl)

    forward, _ = work.elementwise(batch * time * heads * width, BF16)
    return Case(
        name=f"rotary B{batch} T{time} H{heads} K{width}",
        inputs={"x": draw.normal(batch, time, heads, width)},
        oracle=run("reference"),
        contenders={impl: run(impl) for impl in ("triton", "reference", *(["fla"] if peers else []))},
        tolerance=BF16_TOLERANCE,
        forward=forward,
        backward=forward,
    )


def convolution(draw: Inputs, batch: int, time: int, width: int, peers: bool) -> Case:
    taps = 4
    inputs = {"x": draw.normal(batch, time, width), "weight": draw.normal(width, taps), "bias": draw.normal(width)}

    def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight[:, None], bias, groups=width)).mT

    others: dict[str, Contender] = {"torch": torch_conv}
    if peers:
        from fla.modules.convolution import causal_conv1d as theirs

        others["fla"] = lambda x, weight, bias: theirs(x, weight, bias, activation="silu")[0]
        if find_spec("causal_conv1d"):
            from causal_conv1d import causal_conv1d_fn

            others["causal-conv1d"] = lambda x, weight, bias: causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT
    forward, backward = work.elementwise(batch * time * width, BF16)
    return Case(
        name=f"causal_conv1d B{batch} T{time} D{width} W{taps} silu",
        inputs=inputs,
        oracle=form(causal_conv1d, "chunked", activation="silu"),
        contenders={"triton": form(causal_conv1d, "triton", activation="silu"), **others},
        tolerance=BF16_TOLERANCE,
        forward=forward,
        backward=backward,
    )


def norm(draw: Inputs, tokens: int, width: int, peers: bool) -> Case:
    inputs = {"x": draw.normal(tokens, width), "weight": 1 + 0.1 * draw.normal(width)}
    others: dict[str, Contender] = {"torch": lambda x, weight: F.rms_norm(x, (width,), weight, 1e-6)}
    if peers:
        from fla.modules.layernorm import rms_norm as theirs

        others["fla"] = lambda x, weight: theirs(x, weight, None, eps=1e-6)
    forward, backward = work.elementwise(tokens * width, BF16)
    return Case(
        name=f"rms_norm M{tokens} D{width}",
        inputs=inputs,
        oracle=lambda x, weight: rms_norm(x, weight, impl="reference"),
        contenders={"triton": lambda x, weight: rms_norm(x, weight, impl="triton"), **others},
        tolerance=BF16_TOLERANCE,
        forward=forward,
        backward=backward,
    )


def cross_entropy(draw: Inputs, tokens: int, width: int, vocabulary: int, peers: bool) -> Case:
    """The mean over tokens, as other projects' fused losses give nothing else."""
    labels = torch.arange(tokens, device=draw.device) * 7 % vocabulary
    inputs = {"x": draw.normal(tokens, width), "weight": draw.normal(vocabulary, width) / width**0.5}

    def mean(impl: str) -> Contender:
        return lambda x, weight: linear_cross_entropy(x, weight, labels, impl=impl)[0].mean()

    def full_logits(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels)

    others: dict[str, Contender] = {"full logits": full_logits}
    if peers:
        from fla.modules import FusedLinearCrossEntropyLoss

        loss = FusedLinearCrossEntropyLoss()
        others["fla"] = lambda x, weight: loss(x, labels, weight)
        if find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            others["liger"] = lambda x, weight: liger(weight, x, labels)
    forward, backward = work.linear_cross_entropy(tokens, width, vocabulary)
    return Case(
        name=f"linear_cross_entropy M{tokens} D{width} N{vocabulary}",
        inputs=inputs,
        oracle=full_logits,
        contenders={"triton": mean("triton"), **others},
        tolerance=BF16_TOLERANCE,
        forward=forward,
        backward=backward,
    )
