"""Which implementations of an op exist, and which one a name stands for."""

# Best first: "auto" takes the first.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("chunked", "reference"),
    "causal_conv1d": ("chunked", "reference"),
    "diagonal_lstm": ("chunked", "reference"),
    "gated_delta_rule": ("chunked", "reference"),
    "gated_linear_attention": ("chunked", "reference"),
    "linear_cross_entropy": ("chunked", "reference"),
    "linear_scan": ("chunked", "reference"),
    "local_attention": ("chunked", "reference"),
    "rms_norm": ("reference",),
    "rotary": ("reference",),
}


def resolve_impl(op: str, impl: str, device_type: str) -> str:
    """The implementation that `impl` ("auto" or a name) stands for on a device such as "cpu" or "cuda".

    Raises ValueError, naming what can run, for an unknown op or an implementation that cannot run on the device.
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"op: {op!r} is not known; choose one of {', '.join(IMPLEMENTATIONS)}")
    available = IMPLEMENTATIONS[op]
    if impl == "auto":
        return available[0]
    if impl not in available:
        raise ValueError(
            f"impl: {op} has no implementation {impl!r} for device {device_type!r}; "
            f"choose one of {', '.join(('auto', *available))}"
        )
    return impl
