"""Logits of a flash-linear-attention directory through that library's naive recurrences, on any machine.

What stands around the recurrences follows its layers line by line: it is driven by the directory's `config.json` and
tensors under their stored names alone, so that a wrong name, shape, slice or setting shows.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.hf.formats import Loaded
from models.hf.weights import open_weights

Read = Callable[[str], Tensor]
"""A tensor of the directory by its name, in fp32."""

L2_EPS = 1e-6
HGRN2_NORM_EPS = 1e-5


def load_naive(directory: Path) -> Loaded:
    """Raises ValueError where flash-linear-attention is not installed."""
    try:
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
        from fla.ops.gla.naive import naive_recurrent_gla
    except ImportError as error:
        raise ValueError(
            f"flash-linear-attention cannot be imported ({error}), and its naive recurrences check this format; "
            "install it (pip install flash-linear-attention), or choose another --format"
        ) from None
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = open_weights(directory)
    mixer, rule = {
        "hgrn2": (_hgrn2, naive_recurrent_gla),
        "gated_deltanet": (_gated_deltanet, naive_recurrent_gated_delta_rule),
    }[config["model_type"]]

    def read(name: str) -> Tensor:
        return weights.read(name).float()

    @torch.no_grad()
    def logits(input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, read("model.embeddings.weight"))
        for index in range(config["num_hidden_layers"]):
            layer = f"model.layers.{index}."
            normed = _norm(x, read(layer + "attn_norm.weight"), config["norm_eps"])
            x = x + mixer(normed, config, read, index, rule)
            x = x + _mlp(_norm(x, read(layer + "mlp_norm.weight"), config["norm_eps"]), read, layer + "mlp.")
        head = "model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        return F.linear(_norm(x, read("model.norm.weight"), config["norm_eps"]), read(head))

    how = (
        f"`{config['architectures'][0]}` cannot run without a GPU: its forward was followed step by step with "
        f"flash-linear-attention's own `{rule.__name__}`, from the stored configuration and tensors; logits compared"
    )
    return Loaded(logits, None, how)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _mlp(x: Tensor, read: Read, prefix: str) -> Tensor:
    gate, up = (F.linear(x, read(f"{prefix}{name}_proj.weight")) for name in ("gate", "up"))
    return F.linear(F.silu(gate) * up, read(f"{prefix}down_proj.weight"))


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    """Causal, a channel each; weight `[D, 1, W]`."""
    padded = F.pad(x.mT, (weight.shape[-1] - 1, 0))
    return F.conv1d(padded, weight, groups=len(weight)).mT


def _projected(x: Tensor, config: Mapping[str, Any], read: Read, prefix: str, letters: str) -> list[Tensor]:
    streams = [F.linear(x, read(f"{prefix}{letter}_proj.weight")) for letter in letters]
    if not config["use_short_conv"]:
        return streams
    return [_conv(z, read(f"{prefix}{letter}_conv1d.weight")) for letter, z in zip(letters, streams, strict=True)]


def _hgrn2(x: Tensor, config: Mapping[str, Any], read: Read, index: int, rule: Callable[..., Any]) -> Tensor:
    prefix = f"model.layers.{index}.attn."
    q, f, v = _projected(x, config, read, prefix, "qfi")
    log_decay = F.logsigmoid(f)
    if config["use_lower_bound"] and index > 0:
        shares = read("model.lower_bounds").softmax(0)
        bound = shares.cumsum(0)[index] - shares[0]
        log_decay = torch.logaddexp(bound.log(), torch.log1p(-bound) + log_decay)
    k = 1 - log_decay.exp()
    heads = config["hidden_size"] // config["expand_ratio"]
    q, k, v, log_decay = (z.unflatten(-1, (heads, -1)) for z in (F.silu(q), k, v, log_decay))
    o, _ = rule(q, k, v, log_decay)
    return F.linear(
        _norm(o.flatten(-2), read(prefix + "g_norm.weight"), HGRN2_NORM_EPS), read(prefix + "o_proj.weight")
    )


def _gated_deltanet(x: Tensor, config: Mapping[str, Any], read: Read, index: int, rule: Callable[..., Any]) -> Tensor:
    prefix = f"model.layers.{index}.attn."
    heads, value_heads = config["num_heads"], config["num_v_heads"] or config["num_heads"]
    q, k, v = (F.silu(z) for z in _projected(x, config, read, prefix, "qkv"))
    q, k = (z.unflatten(-1, (heads, config["head_dim"])) for z in (q, k))
    q, k = (z * torch.rsqrt(z.square().sum(-1, keepdim=True) + L2_EPS) for z in (q, k))
    q, k = (z.repeat_interleave(value_heads // heads, dim=2) for z in (q, k))
    step = F.softplus(F.linear(x, read(prefix + "a_proj.weight")) + read(prefix + "dt_bias"))
    beta = torch.sigmoid(F.linear(x, read(prefix + "b_proj.weight"))) * (2 if config["allow_neg_eigval"] else 1)
    o, _ = rule(q, k, v.unflatten(-1, (value_heads, -1)), beta, -read(prefix + "A_log").exp() * step)
    o = _norm(o, read(prefix + "o_norm.weight"), config["norm_eps"])
    if config["use_gate"]:
        o = o * F.silu(F.linear(x, read(prefix + "g_proj.weight")).view_as(o))
    return F.linear(o.flatten(-2), read(prefix + "o_proj.weight"))
