"""What Gated DeltaNet's mixer promises beyond the contract of all mixers."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.init import initialize
from models.mixers.gated_deltanet import L2_EPS, GatedDeltaNet, GatedDeltaNetConfig
from models.mixers.placement import Placement
from ops import Layout, rms_norm
from training.optimizer import parameter_groups

CONFIG = GatedDeltaNetConfig(heads=2, value_heads=4, head_dim=8, expand_v=1.5, conv_width=3, negative_eigenvalues=True)
WIDTH = 24


def build(config: GatedDeltaNetConfig = CONFIG, width: int = WIDTH) -> GatedDeltaNet:
    mixer = GatedDeltaNet(config, Placement(width=width))
    initialize(mixer, seed=0)
    return mixer.double()


def hidden(time: int = 11) -> Tensor:
    return torch.randn(2, time, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_initial_decays_are_the_published_ones() -> None:
    """Rates uniform in (0, 16], steps log-uniform in 0.001 to 0.1."""
    mixer = build(GatedDeltaNetConfig(heads=4096, head_dim=1, expand_v=1.0), width=2)
    rate = mixer.A_log.detach().exp()
    assert 0 < rate.min() < 0.05
    assert 15.95 < rate.max() <= 16 + 1e-5
    assert rate.mean() == pytest.approx(8, abs=0.3)
    step = torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert 1e-3 * (1 - 1e-5) <= step.min() < 1.02e-3
    assert 0.098 < step.max() <= 0.1 * (1 + 1e-5)
    assert step.log().mean() == pytest.approx(math.log(1e-2), abs=0.1)


def test_a_fresh_mixer_is_not_silenced_by_its_norm() -> None:
    """The outputs' variance is far above the eps that would swallow them."""
    mixer = build(GatedDeltaNetConfig(heads=4, head_dim=64), width=256)
    seen: list[Tensor] = []
    mixer.core.register_forward_hook(lambda _module, _inputs, result: seen.append(result[0]))
    mixer(torch.randn(1, 128, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None)
    assert seen[0].square().mean() > 5 * mixer.norm.eps


@pytest.mark.parametrize(("negative", "limit"), [(False, 1.0), (True, 2.0)])
def test_strength_reaches_its_limit(negative: bool, limit: float) -> None:
    mixer = build(dataclasses.replace(CONFIG, negative_eigenvalues=negative))
    log_decay, beta = mixer.gated(100 * hidden())
    assert log_decay.max() <= 0
    assert 0 <= beta.min() < 1e-6
    assert beta.max().item() == pytest.approx(limit, abs=1e-6)


def test_decays_are_computed_in_fp32() -> None:
    """From bf16 activations; exp(A_log) and softplus in bf16 would err by 1e-2."""
    mixer = build().float()
    x = hidden().float()
    with torch.autocast("cpu", torch.bfloat16):
        log_decay, beta = mixer.gated(x)
        inputs = mixer.decay_proj(x).double()
    step = torch.nn.functional.softplus(inputs + mixer.dt_bias.double())
    assert log_decay.dtype == beta.dtype == torch.float32
    torch.testing.assert_close(log_decay.double(), -mixer.A_log.double().exp() * step, rtol=1e-6, atol=0)


def test_rates_and_steps_are_not_decayed() -> None:
    mixer = build()
    decayed, spared = parameter_groups(torch.nn.ModuleDict({"mixer": mixer}), 0.1)
    spared_names = {name for name, p in mixer.named_parameters() if any(p is other for other in spared["params"])}
    assert spared_names == {"A_log", "dt_bias", "norm.weight"}
    assert len(decayed["params"]) == 8


def test_first_token_by_hand() -> None:
    """From an empty memory a token reads its own value: o = K^-0.5 beta (q . k) v, normed and gated."""
    mixer, x = build(), hidden(1)
    with torch.no_grad():
        mixer.norm.weight.normal_()
    tap = mixer.conv.weight[:, -1]
    mixed = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1) * tap
    q, k, v = (z.unflatten(-1, (-1, n)) for z, n in zip((mixed * mixed.sigmoid()).split((16, 16, 48), -1), (8, 8, 12)))
    q, k = ((z / (z.square().sum(-1, keepdim=True) + L2_EPS).sqrt()).repeat_interleave(2, 2) for z in (q, k))
    beta = 2 * torch.sigmoid(mixer.beta_proj(x))
    o = 8**-0.5 * (beta * (q * k).sum(-1))[..., None] * v
    gate = mixer.gate_proj(x).unflatten(-1, (-1, 12))
    expected = mixer.o_proj(rms_norm(o, mixer.norm.weight, eps=1e-5, gate=gate).flatten(-2))
    torch.testing.assert_close(mixer(x, None)[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "switches",
    [{"conv_width": None}, {"conv_bias": True}, {"output_gate": False}, {"conv_width": None, "output_gate": False}],
    ids=str,
)
def test_switches(switches: dict[str, Any]) -> None:
    """Each keeps the formula of size, the state and the gradients: what is switched off leaves nothing behind."""
    mixer, x = build(dataclasses.replace(CONFIG, **switches)), hidden().requires_grad_()
    assert mixer.config.num_params(WIDTH) == sum(p.numel() for p in mixer.parameters())
    layout = Layout(torch.cat([torch.arange(4), torch.arange(7)]).repeat(2, 1))
    whole, _ = mixer(x, layout)
    state, pieces = mixer.init_state(2, "cpu"), []
    for piece, places in zip(x.split((3, 1, 7), dim=1), layout.positions.split((3, 1, 7), dim=1)):
        y, state = mixer(piece, Layout(places.contiguous()), state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-10)
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_heads_can_be_cut() -> None:
    """Each half of the heads, with its rows of every group of the fused convolution, is a mixer of its own; the
    outputs of the halves add up. Shapes come from the tensors: the halves keep the whole one's config of a head."""
    whole, x = build(), hidden()
    layout = Layout(torch.cat([torch.arange(4), torch.arange(7)]).repeat(2, 1))
    expected, _ = whole(x, layout)
    total = torch.zeros_like(expected)
    for half in range(2):
        part = build(dataclasses.replace(CONFIG, heads=1, value_heads=2))
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(cut(name, whole.get_parameter(name), half))
        total = total + part(x, layout)[0]
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)


def cut(name: str, tensor: Tensor, half: int) -> Tensor:
    if name == "norm.weight":
        return tensor
    if name == "o_proj.weight":
        return tensor.chunk(2, dim=1)[half]
    groups = tensor.split((16, 16, 48)) if name == "conv.weight" else (tensor,)
    return torch.cat([group.chunk(2)[half] for group in groups])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 0}, "heads: 0; must be at least 1"),
        ({"head_dim": -8}, "head_dim: -8; must be at least 1"),
        ({"conv_width": 0}, "conv_width: 0; must be at least 1"),
        ({"conv_width": None, "conv_bias": True}, "conv_bias: true without a convolution; set conv_width"),
        ({"value_heads": 5}, r"value_heads: 5; must be a positive multiple of heads \(2\): choose e.g. 4"),
        ({"value_heads": 1}, r"value_heads: 1; .* choose e.g. 2"),
        ({"value_heads": 0}, "value_heads: 0; must be a positive multiple"),
        ({"expand_v": 1.3}, r"expand_v: 1.3; times head_dim \(8\) must be a whole number .* choose e.g. 1.25"),
        ({"expand_v": 0.01}, "choose e.g. 0.125"),
        ({"norm_eps": -1.0}, "norm_eps: -1.0; must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_a_ratio_that_is_no_exact_number() -> None:
    config = GatedDeltaNetConfig(heads=1, head_dim=96, expand_v=4 / 3)
    assert config.value_dim == 128
    assert config.num_params(10) == sum(p.numel() for p in GatedDeltaNet(config, Placement(width=10)).parameters())
