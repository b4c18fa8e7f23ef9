"""checked_values: what ops say about values that no recurrence survives, on request alone."""

import pytest
import torch

from ops import Layout, checked_values, gated_delta_rule, gated_linear_attention, linear_scan


def test_values_are_read_on_request_alone() -> None:
    x, rising = torch.randn(1, 4, 3), torch.full((1, 4, 3), 0.5)
    assert linear_scan(x, rising)[0].isfinite().all()
    with checked_values(), pytest.raises(ValueError, match=r"linear_scan: log_decay has a value of 0.5; must be <= 0"):
        linear_scan(x, rising)
    assert linear_scan(x, rising)[0].isfinite().all()


def test_a_decay_that_is_no_number() -> None:
    q, log_decay = torch.randn(1, 4, 1, 3), torch.zeros(1, 4, 1, 3)
    log_decay[0, 1] = torch.nan
    with checked_values(), pytest.raises(ValueError, match="log_decay has a value of nan"):
        gated_linear_attention(q, q, q, log_decay)


def test_keys_too_long_for_their_strength() -> None:
    k = torch.ones(1, 4, 1, 4) / 2
    beta, log_decay = torch.full((1, 4, 2), 2.0), torch.zeros(1, 4, 2)
    v = torch.randn(1, 4, 2, 3)
    with checked_values():
        gated_delta_rule(k, k, v, log_decay, beta)
        with pytest.raises(ValueError, match=r"beta \* \|k\|\^2 lies between 2.42 and 2.42; must lie between 0 and 2"):
            gated_delta_rule(k, 1.1 * k, v, log_decay, beta)


def test_positions_changed_after_the_layout_was_built() -> None:
    """On an accelerator the layout itself reads no values."""
    layout = Layout(torch.arange(4)[None])
    layout.positions[0, 2] = 7
    x = torch.randn(1, 4, 3)
    linear_scan(x, -x.abs(), layout=layout)
    with checked_values(), pytest.raises(ValueError, match="1 is followed by 7 in row 0 at t = 2"):
        linear_scan(x, -x.abs(), layout=layout)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32, torch.bool])
def test_dtypes_that_no_implementation_computes_in(dtype: torch.dtype) -> None:
    x, right = torch.zeros(1, 4, 2, 3, dtype=dtype), torch.zeros(1, 4, 2, 3)
    message = rf"{{}} has dtype {dtype}; must be bfloat16, float16, float32 or float64"
    with pytest.raises(ValueError, match="linear_scan: " + message.format("x")):
        linear_scan(x[..., 0], right[..., 0])
    with pytest.raises(ValueError, match="gated_linear_attention: " + message.format("k")):
        gated_linear_attention(right, x, right, right)
    with pytest.raises(ValueError, match="gated_delta_rule: " + message.format("beta")):
        gated_delta_rule(right, right, right, right[..., 0], x[..., 0])
