"""ParaRNN's parametrisation: the block from its equations, the limit on recurrent weights, initial values, switches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.init import initialize
from models.mixers.paralstm import ParaLSTM, ParaLSTMConfig
from models.mixers.placement import Placement
from ops import Layout

WIDTH = 12


def build(**settings: Any) -> ParaLSTM:
    mixer = ParaLSTM(ParaLSTMConfig(**({"width": 16, "heads": 4} | settings)), Placement(width=WIDTH)).double()
    initialize(mixer, seed=0)
    with torch.no_grad():  # every bias, limit and gain must matter
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return mixer


def block(mixer: ParaLSTM, x: torch.Tensor) -> torch.Tensor:
    """The published block, one document `[T, D]`, from the paper's equations."""
    weights = dict(mixer.named_parameters())
    channels = mixer.config.width
    h = x @ weights["x_proj.weight"].T
    taps = F.pad(h.T, (3, 0)).unfold(1, 4, 1)  # [R, T, W]
    h = F.silu(torch.einsum("rtw,rw->tr", taps, weights["conv.weight"]) + weights["conv.bias"])
    dense = torch.zeros(3, channels, channels, dtype=x.dtype)  # B as three dense matrices, (gate, in, out)
    for i, head in enumerate(weights["input_matrix.weight"]):
        rows = slice(4 * i, 4 * i + 4)
        dense[:, rows, rows] = head.transpose(0, 1)
    f_x, o_x, z_x = torch.einsum("ti,gio->gto", h, dense) + weights["input_matrix.bias"][:, None]
    a_f, a_o, a_z = weights["recurrent"].clamp(-0.5, 0.5)
    c_f, c_o = weights["peephole"].clamp(-0.5, 0.5)
    cell = hidden = torch.zeros(channels, dtype=x.dtype)
    outputs = []
    for t in range(len(x)):
        f = torch.sigmoid(a_f * hidden + f_x[t] + c_f * cell)
        cell = f * cell + (1 - f) * torch.tanh(a_z * hidden + z_x[t])
        hidden = torch.sigmoid(a_o * hidden + o_x[t] + c_o * cell) * torch.tanh(cell)
        outputs.append(hidden)
    h = F.rms_norm(torch.stack(outputs), (channels,), weights["norm.weight"], eps=1e-6)
    gated = h * F.silu(x @ weights["gate_proj.weight"].T)
    return weights["residual_scale"] * (gated @ weights["out_proj.weight"].T)


def test_is_the_published_block() -> None:
    mixer = build()
    assert (mixer.recurrent.abs() > 0.5).any()
    x = torch.randn(1, 30, WIDTH, dtype=torch.float64)
    y, _ = mixer(x, Layout(torch.arange(30)[None]))
    torch.testing.assert_close(y[0], block(mixer, x[0]), rtol=1e-10, atol=1e-12)


def test_tells_how_the_recurrence_was_solved() -> None:
    """Segments side by side, as a row of 16 channels does not fill the machine; a call without them says so."""
    mixer = build()
    assert mixer.metrics() == {}
    mixer(torch.randn(1, 512, WIDTH, dtype=torch.float64), None)
    assert {name: value.shape for name, value in mixer.metrics().items()} == {
        "corrections": (),
        "residual": (),
        "sequential_channels": (),
    }
    figures = {name: float(value) for name, value in mixer.metrics().items()}
    assert 1 <= figures["corrections"] <= 3
    assert 0 <= figures["residual"] <= 1e-13
    mixer(torch.randn(1, 5, WIDTH, dtype=torch.float64), None)
    assert mixer.metrics()["corrections"] == 0


def test_published_defaults() -> None:
    config = ParaLSTMConfig(width=2048)
    assert (config.heads, config.conv_width, config.weight_limit) == (4, 4, 0.5)
    assert config.forget_bias == (0.0, 0.0)
    assert config.residual_scale


def test_weights_beyond_the_limit_act_as_the_limit_and_can_return() -> None:
    mixer, x = build(weight_limit=0.5), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    layout = Layout(torch.arange(9).expand(2, -1).contiguous())
    with torch.no_grad():
        mixer.recurrent.fill_(3.0)
        mixer.peephole.fill_(-3.0)
    beyond, _ = mixer(x, layout)
    beyond.square().sum().backward()
    gradients = mixer.recurrent.grad, mixer.peephole.grad
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    with torch.no_grad():
        mixer.recurrent.fill_(0.5)
        mixer.peephole.fill_(-0.5)
    at, _ = mixer(x, layout)
    torch.testing.assert_close(beyond, at, rtol=0, atol=0)
    unlimited = build(weight_limit=None)
    with torch.no_grad():
        unlimited.recurrent.fill_(3.0)
    assert unlimited.bounded(unlimited.recurrent) is unlimited.recurrent


def test_initial_values() -> None:
    config = ParaLSTMConfig(width=1024, heads=4, forget_bias=(0.0, -1.0))
    mixer = ParaLSTM(config, Placement(width=8))
    initialize(mixer, seed=0)
    for weight in (mixer.recurrent, mixer.peephole):  # Xavier-Gaussian of a 1024 x 1024 diagonal
        assert weight.std().item() == pytest.approx(1024**-0.5, rel=0.05)
    bound = (6 / 256) ** 0.5  # Kaiming-uniform of a head's 256 inputs
    assert 0.99 * bound < mixer.input_matrix.weight.abs().max() <= bound
    assert mixer.input_matrix.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    torch.testing.assert_close(mixer.input_matrix.bias[0], torch.linspace(0, -1, 1024))
    assert not mixer.input_matrix.bias[1:].any()
    assert 0.49 < mixer.conv.weight.abs().max() <= 0.5
    assert mixer.residual_scale is not None
    assert mixer.residual_scale.item() == 1.0


@pytest.mark.parametrize(
    "switches",
    [
        {"input_projection": False, "width": WIDTH},
        {"output_gate": False},
        {"residual_scale": False},
        {"conv_activation": None, "conv_width": 1},
    ],
    ids=["no input projection", "no gate", "no scale", "linear conv"],
)
def test_switches(switches: dict[str, Any]) -> None:
    """Each changes what is computed, keeps the formulas of size and leaves no parameter without a gradient."""
    mixer, x = build(**switches), torch.randn(1, 7, WIDTH, dtype=torch.float64)
    layout = Layout(torch.arange(7)[None])
    assert mixer.config.num_params(WIDTH) == sum(p.numel() for p in mixer.parameters())
    y, _ = mixer(x, layout)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())
    assert (y - build()(x, layout)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30}, r"width: 30; must be a positive multiple of heads \(4\): choose e.g. width 32"),
        ({"width": 16, "heads": 0}, "heads: 0; must be at least 1"),
        ({"width": 16, "conv_width": 0}, "conv_width: 0; must be at least 1"),
        ({"width": 16, "norm_eps": 0.0}, "norm_eps: 0.0; must be positive"),
        ({"width": 16, "weight_limit": 0.0}, "weight_limit: 0.0; must be positive, or null"),
        ({"width": 16, "input_projection": False}, r"width: 16; must be the model's width \(12\).*input_projection"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParaLSTM(ParaLSTMConfig(**settings), Placement(width=WIDTH))
