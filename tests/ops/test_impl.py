"""resolve_impl, and that every op's table of implementations is the one it runs."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import ops
from ops.impl import AUTO, IMPLEMENTATIONS, resolve_impl
from tests.ops.compare import DEVICE, runnable


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
    """On DEVICE, with the sizes and the dtype that attention kernels of a GPU take."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    def decay(*shape: int) -> Tensor:
        return -normal(*shape, dtype=torch.float32).abs()

    def whole(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=DEVICE)

    x, q, gates = normal(1, 3, 16), normalize(normal(1, 3, 2, 16), dim=-1), normal(1, 3, 3, 16)
    weights, peepholes = normal(3, 16, dtype=torch.float32), normal(2, 16, dtype=torch.float32)
    strength = -decay(1, 3, 2).tanh()
    calls = {
        "attention": lambda impl: ops.attention(q, q, q, impl=impl),
        "causal_conv1d": lambda impl: ops.causal_conv1d(x, normal(16, 4), impl=impl),
        "diagonal_gru": lambda impl: ops.diagonal_gru(gates, weights, impl=impl),
        "diagonal_lstm": lambda impl: ops.diagonal_lstm(gates, weights, peepholes, impl=impl),
        "gated_delta_rule": lambda impl: ops.gated_delta_rule(q, q, q, decay(1, 3, 2), strength, impl=impl),
        "gated_linear_attention": lambda impl: ops.gated_linear_attention(q, q, q, decay(1, 3, 2, 16), impl=impl),
        "linear_cross_entropy": lambda impl: ops.linear_cross_entropy(x, normal(5, 16), whole(1, 3), impl=impl),
        "linear_scan": lambda impl: ops.linear_scan(x, decay(1, 3, 16), impl=impl),
        "local_attention": lambda impl: ops.local_attention(q, q, q, window=2, impl=impl),
        "rms_norm": lambda impl: ops.rms_norm(x, normal(16), impl=impl),
        "rotary": lambda impl: ops.rotary(q, whole(1, 3), impl=impl),
    }
    assert calls.keys() == IMPLEMENTATIONS.keys()
    for op, call in calls.items():
        for impl in ("auto", "reference", *runnable(op)):
            result = call(impl)
            output = result[0] if isinstance(result, tuple) else result
            assert output.isfinite().all(), (op, impl)
            assert output.device.type == DEVICE
