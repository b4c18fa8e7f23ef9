"""resolve_impl, and that every op's table of implementations is the one it runs."""

import pytest
import torch

import ops
from ops.impl import AUTO, IMPLEMENTATIONS, resolve_impl
from tests.ops.compare import runnable


def test_auto_is_a_table() -> None:
    for table in AUTO.values():
        assert table.keys() == IMPLEMENTATIONS.keys()
        assert all(choice in IMPLEMENTATIONS[op] for op, choice in table.items())
    assert resolve_impl("linear_scan", "auto", "cpu") == "chunked"
    assert resolve_impl("linear_scan", "reference", "cuda") == "reference"
    assert resolve_impl("rotary", "auto", "cpu") == "reference"


@pytest.mark.parametrize(
    ("op", "impl", "message"),
    [
        ("linear_scan", "tritn", "linear_scan has no implementation 'tritn'; choose one of auto, chunked, "),
        ("rotary", "chunked", "choose one of auto, reference"),
        ("linear_scam", "auto", "'linear_scam' is not known; choose one of attention, "),
    ],
)
def test_refuses(op: str, impl: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_impl(op, impl, "cpu")


def test_every_listed_implementation_runs() -> None:
    x = torch.randn(1, 3, 4)
    q = torch.randn(1, 3, 2, 4)
    calls = {
        "attention": lambda impl: ops.attention(q, q, q, impl=impl),
        "causal_conv1d": lambda impl: ops.causal_conv1d(x, torch.randn(4, 2), impl=impl),
        "diagonal_gru": lambda impl: ops.diagonal_gru(torch.randn(1, 3, 3, 4), torch.randn(3, 4), impl=impl),
        "diagonal_lstm": lambda impl: ops.diagonal_lstm(
            torch.randn(1, 3, 3, 4), torch.randn(3, 4), torch.randn(2, 4), impl=impl
        ),
        "gated_delta_rule": lambda impl: ops.gated_delta_rule(q, q, q, -x[..., :2].abs(), x[..., 2:].abs(), impl=impl),
        "gated_linear_attention": lambda impl: ops.gated_linear_attention(q, q, q, -q.abs(), impl=impl),
        "linear_cross_entropy": lambda impl: ops.linear_cross_entropy(
            x, torch.randn(5, 4), torch.zeros(1, 3, dtype=torch.int64), impl=impl
        ),
        "linear_scan": lambda impl: ops.linear_scan(x, -x.abs(), impl=impl),
        "local_attention": lambda impl: ops.local_attention(q, q, q, window=2, impl=impl),
        "rms_norm": lambda impl: ops.rms_norm(x, torch.randn(4), impl=impl),
        "rotary": lambda impl: ops.rotary(q, torch.arange(3)[None], impl=impl),
    }
    assert calls.keys() == IMPLEMENTATIONS.keys()
    for op, call in calls.items():
        for impl in ("auto", "reference", *runnable(op)):
            assert call(impl)[0].isfinite().all(), (op, impl)
