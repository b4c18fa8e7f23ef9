"""Which implementations of an op exist, which can run here, and which one `auto` stands for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("chunked", "reference", "sdpa", "flex", "flash_attn", "fla"),
    "causal_conv1d": ("chunked", "reference", "triton", "fla"),
    "diagonal_gru": ("chunked", "reference", "triton"),
    "diagonal_lstm": ("chunked", "reference", "triton"),
    "gated_delta_rule": ("chunked", "reference", "triton", "fla"),
    "gated_linear_attention": ("chunked", "reference", "triton", "fla"),
    "linear_cross_entropy": ("chunked", "reference", "triton"),
    "linear_scan": ("chunked", "reference", "triton", "fla"),
    "local_attention": ("chunked", "reference", "sdpa", "flex", "flash_attn", "fla"),
    "rms_norm": ("chunked", "reference", "triton", "fla"),
    "rotary": ("reference", "triton", "fla"),
}

# What `auto` takes, from measurements in benchmarks/results. Only a measured device has a column: kernels
# that nobody has timed are asked for by name.
AUTO: dict[str, dict[str, str]] = {
    "cpu": {
        "attention": "chunked",
        "causal_conv1d": "chunked",
        "diagonal_gru": "chunked",
        "diagonal_lstm": "chunked",
        "gated_delta_rule": "chunked",
        "gated_linear_attention": "chunked",
        "linear_cross_entropy": "chunked",
        "linear_scan": "chunked",
        "local_attention": "chunked",
        "rms_norm": "chunked",
        "rotary": "reference",
    },
}
# On a device without a column, torch's own fused attention, which torch measures, and else what the CPU's says.
UNMEASURED = AUTO["cpu"] | {"attention": "sdpa", "local_attention": "sdpa"}

# Implementation -> the package it needs. They run on a GPU only, triton's also under its interpreter.
GPU_ONLY = {"triton": "triton", "fla": "fla", "flash_attn": "flash_attn", "flex": "torch"}
INSTALLED = frozenset(package for package in GPU_ONLY.values() if find_spec(package) is not None)


def resolve_impl(op: str, impl: str, device_type: str) -> str:
    """The implementation that `impl` ("auto" or a name) stands for on a device such as "cpu" or "cuda".

    Raises ValueError, naming what can run, for an unknown op or an implementation that cannot run on the device.
    """
    check_impl(op, impl)
    if impl == "auto":
        return AUTO.get(device_type, UNMEASURED)[op]
    reason = _obstacle(impl, device_type)
    if reason:
        able = [name for name in IMPLEMENTATIONS[op] if not _obstacle(name, device_type)]
        raise ValueError(
            f"impl: {op}'s {impl!r} cannot run on device {device_type!r}: {reason}; choose one of "
            f"{', '.join(('auto', *able))}"
        )
    return impl


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside `with`, what is installed may be asked for on any device: for tensors without entries, which no kernel
    ever sees. Not for several threads."""
    global _shapes_alone
    _shapes_alone = True
    try:
        yield
    finally:
        _shapes_alone = False


_shapes_alone = False


def check_impl(op: str, impl: str) -> None:
    """Raise ValueError unless `impl` is "auto" or an implementation that op has, whatever it needs to run."""
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"op: {op!r} is not known; choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl != "auto" and impl not in IMPLEMENTATIONS[op]:
        raise ValueError(
            f"impl: {op} has no implementation {impl!r}; choose one of {', '.join(('auto', *IMPLEMENTATIONS[op]))}"
        )


def _obstacle(impl: str, device_type: str) -> str | None:
    package = GPU_ONLY.get(impl)
    if package is None:
        return None
    if package not in INSTALLED:
        return f"it needs the package {package}, which is not installed"
    if device_type == "cuda" or _shapes_alone:
        return None
    if impl == "triton":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "it needs a GPU, or TRITON_INTERPRET=1 for a test"
    return "it needs a GPU"
