"""Other projects' delta-rule models on a CPU, in a process of their own: `python delta_oracles.py KIND REQUEST ANSWER`.

Their fast paths need a GPU. transformers binds its torch ones only where flash-linear-attention cannot be imported, and
flash-linear-attention's models run once its kernels are replaced by its own naive ops: both would disturb other tests.

REQUEST holds a list of cases, dictionaries of `config`, `weights` (under the project's names), `part` (lm, block,
mixer), `layer`, `x` (token ids [B, T], or hidden [B, T, D]), `cotangent` of the output and `documents`, lengths that
add up to T and are run one by one. ANSWER gets, for each, `output` and the gradients `d x` and of all parameters used.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WithoutFla:
    """An import finder for which flash-linear-attention is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "fla":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def olmo_hybrid(config: dict[str, Any]) -> nn.Module:
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    settings = OlmoHybridConfig(**config, pad_token_id=None, attn_implementation="sdpa")
    if settings.rope_parameters["rope_theta"] is None:
        settings.rope_parameters = None
    return OlmoHybridForCausalLM(settings)


def gated_deltanet(config: dict[str, Any]) -> nn.Module:
    import fla.layers.gated_deltanet as layer
    import fla.models.gated_deltanet.modeling_gated_deltanet as modeling
    import fla.modules.mlp as mlp
    from fla.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    layer.chunk_gated_delta_rule = naive_rule  # type: ignore[attr-defined]
    layer.causal_conv1d = torch_conv  # type: ignore[attr-defined]
    mlp.swiglu = lambda gate, y: F.silu(gate) * y  # type: ignore[attr-defined]
    config = dict(config)
    conv_bias = config.pop("conv_bias")

    class Layer(layer.GatedDeltaNet):
        """With a setting of the layer that the model's configuration does not pass on."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings, conv_bias=conv_bias)

    modeling.GatedDeltaNet = Layer  # type: ignore[misc]
    model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**config, fuse_norm=False, fuse_swiglu=False, use_cache=False))
    for block in model.model.layers:
        block.attn.o_norm.forward = torch_norm(block.attn.o_norm)
    return model


def naive_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """What the kernel is asked to do beside the recurrence, around flash-linear-attention's naive recurrence."""
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    assert options["use_qk_l2norm_in_kernel"]
    assert options["use_beta_sigmoid_in_kernel"]
    assert options["use_gate_in_kernel"]
    q, k = (z / torch.sqrt(z.square().sum(-1, keepdim=True) + 1e-6) for z in (q, k))
    q, k = (z.repeat_interleave(v.shape[2] // z.shape[2], dim=2) for z in (q, k))
    beta = beta.sigmoid() * (2 if options["allow_neg_eigval"] else 1)
    return naive_recurrent_gated_delta_rule(q, k, v, beta, -A_log.exp() * F.softplus(g + dt_bias))[0], None


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, **_: Any) -> tuple[Tensor, None]:
    padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
    assert activation == "silu"
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight))).mT, None


def torch_norm(norm: Any) -> Callable[..., Tensor]:
    """Gated where the layer passes a gate."""

    def forward(x: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        return normed if gate is None else normed * F.silu(gate)

    return forward


def run(model: Any, case: dict[str, Any], x: Tensor) -> Tensor:
    if case["part"] == "lm":
        return model(x, use_cache=False).logits
    layer = model.model.layers[case["layer"]]
    if case["part"] == "mixer":
        return layer.linear_attn(x)
    positions = torch.arange(x.shape[1]).expand(len(x), -1)
    angles = None if model.model.rotary_emb is None else model.model.rotary_emb(x, positions)
    return layer(x, position_embeddings=angles, position_ids=positions)


def answer(build: Callable[[dict[str, Any]], nn.Module], case: dict[str, Any]) -> dict[str, Tensor]:
    model = build(case["config"]).train()
    model.load_state_dict(case["weights"], strict=True)
    x = case["x"].clone()
    if x.is_floating_point():
        x.requires_grad_()
    output = torch.cat([run(model, case, piece) for piece in x.split(case["documents"], dim=1)], dim=1)
    (output * case["cotangent"]).sum().backward()
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients} | ({} if x.grad is None else {"d x": x.grad})


if __name__ == "__main__":
    kind, request, target = sys.argv[1:]
    if kind == "olmo_hybrid":
        sys.meta_path.insert(0, WithoutFla())  # type: ignore[arg-type]
    build = {"olmo_hybrid": olmo_hybrid, "gated_deltanet": gated_deltanet}[kind]
    torch.save([answer(build, case) for case in torch.load(request)], target)
