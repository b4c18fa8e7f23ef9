"""RG-LRU's parametrisation: initial decays, the bounded square root, the first token of a document."""

import math

import pytest
import torch

from models.init import initialize
from models.mixers.placement import Placement
from models.mixers.rglru import MAX_SQRT_SLOPE, RGLRU, BoundedSqrt, RGLRUConfig
from ops import Layout


@pytest.mark.parametrize(("rule", "low", "high"), [("recurrentgemma", 0.9**8, 0.999**8), ("paper", 0.9, 0.999)])
def test_initial_decay_at_an_open_gate(rule: str, low: float, high: float) -> None:
    """exp(-8 softplus(p)) fills the interval the source names."""
    mixer = RGLRU(RGLRUConfig(width=4096, gate_blocks=4, decay_init=rule), Placement(width=4))
    initialize(mixer, seed=0)
    decay = torch.exp(-8.0 * torch.nn.functional.softplus(mixer.decay_param.double()))
    assert low - 1e-6 <= decay.min() < low + 0.02 * (high - low)
    assert high - 0.02 * (high - low) < decay.max() <= high + 1e-6


def test_square_root_slope_is_bounded_and_exact_elsewhere() -> None:
    x = torch.tensor([0.0, 1e-12, 1e-4, 0.5], dtype=torch.float64, requires_grad=True)
    y = BoundedSqrt.apply(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), x.detach().sqrt())
    expected = torch.tensor([MAX_SQRT_SLOPE, MAX_SQRT_SLOPE, 50.0, 0.5 / math.sqrt(0.5)], dtype=torch.float64)
    torch.testing.assert_close(x.grad, expected)


def test_first_token_of_a_document_enters_unscaled() -> None:
    mixer = RGLRU(RGLRUConfig(width=8, gate_blocks=2), Placement(width=8))
    initialize(mixer, seed=0)
    h = torch.randn(1, 4, 8)
    inputs, log_decay = mixer.gated(h, Layout(torch.tensor([[0, 1, 0, 1]])))
    gate = torch.sigmoid(mixer.input_gate(h))
    scale = torch.sqrt(-torch.expm1(2 * log_decay))
    torch.testing.assert_close(inputs[:, [0, 2]], (gate * h)[:, [0, 2]])
    torch.testing.assert_close(inputs[:, [1, 3]], (gate * h * scale)[:, [1, 3]])


def test_width_that_its_gate_blocks_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"width: 30; must be a positive multiple of gate_blocks \(4\)"):
        RGLRUConfig(width=30, gate_blocks=4)
