"""What a chunk of the gated delta rule is solved with: the inverse, the decays between its tokens; and long keys."""

import pytest
import torch

from ops import Layout
from ops.gated_delta_rule.decays import chunk_decays, layout_masks
from ops.gated_delta_rule.inverse import unit_lower_inverse
from tests.ops.compare import assert_earned
from tests.ops.test_gated_delta_rule import make_inputs, rule


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64])
def test_inverse(size: int) -> None:
    """What lies on or above the diagonal is not read."""
    lower = torch.randn(3, 2, size, size, dtype=torch.float64) / size
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower.tril(-1))
    torch.testing.assert_close(unit_lower_inverse(lower), expected, rtol=1e-12, atol=1e-12)


def test_decays_are_products_over_their_own_interval() -> None:
    log_decay = -torch.rand(1, 1, 1, 8, dtype=torch.float64)
    log_decay[..., 2], log_decay[..., 5] = -torch.inf, -1e4
    layout = Layout(torch.tensor([[3, 4, 5, 6, 0, 1, 2, 3]]))
    found = chunk_decays(log_decay, layout_masks(layout, 8, torch.float64))
    a = log_decay.flatten().exp()
    for t in range(8):
        for s in range(8):
            visible = s <= t and (t < 4 or s >= 4)
            assert found.pair[0, 0, 0, t, s] == pytest.approx(a[s + 1 : t + 1].prod().item() if visible else 0)
        assert found.carry_in[0, 0, 0, t] == pytest.approx(a[: t + 1].prod().item() if t < 4 else 0)
        assert found.carry_out[0, 0, 0, t] == pytest.approx(a[t + 1 :].prod().item() if t >= 4 else 0)
    assert found.through.item() == 0


def test_unnormalised_keys() -> None:
    """flash-linear-attention #537: keys of norm 30, with beta as small as it takes."""
    inputs = make_inputs(100, width=16)
    inputs["k"], inputs["beta"] = 30 * inputs["k"], inputs["beta"] / 900
    assert_earned(rule, inputs)
