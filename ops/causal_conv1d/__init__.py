"""The short depthwise convolution over time that recurrent blocks put before their recurrence."""

from typing import Any

from torch import Tensor

from ops.causal_conv1d import chunked, reference
from ops.check import check_dim, check_floating, check_layout, check_shape
from ops.impl import resolve_impl
from ops.layout import Layout


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layout: Layout | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(bias + sum_j weight[:, W-1-j] * x_{t-j}), j = 0 ... W-1, for every channel.

    x:              [B, T, D]
    weight:         [D, W] in the order of torch's conv1d: weight[:, W-1] multiplies the current token
    bias:           [D]
    activation:     None or "silu"
    layout:         tap j is used only if positions[t] >= j
    initial_state:  [B, W-1, D], the inputs before x_0, oldest first; zeros by default

    Returns y [B, T, D] in x's dtype, and the last W-1 inputs [B, W-1, D] in fp32 if `output_final_state`, else None;
    inputs before the start of the last document are zero there. Sums run in fp32 (float64 for float64 x).
    Raises ValueError for wrong shapes, dtypes or activation and for an implementation that cannot run here.
    """
    check_dim("causal_conv1d", "x", x, "B T D")
    batch, time, width = x.shape
    check_dim("causal_conv1d", "weight", weight, "D W")
    window = weight.shape[1]
    check_shape("causal_conv1d", "weight", weight, "D W", width, window)
    check_shape("causal_conv1d", "bias", bias, "D", width)
    check_shape("causal_conv1d", "initial_state", initial_state, "B W-1 D", batch, window - 1, width)
    check_floating("causal_conv1d", x=x, weight=weight, bias=bias, initial_state=initial_state)
    check_layout("causal_conv1d", layout, batch, time)
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; must be None or 'silu'")
    chosen = resolve_impl("causal_conv1d", impl, x.device.type)
    module: Any = {"chunked": chunked, "reference": reference}.get(chosen)
    if chosen == "triton":
        from ops.causal_conv1d import triton as module
    elif chosen == "fla":
        from ops.causal_conv1d import fla as module
    y, state = module.causal_conv1d(x, weight, bias, activation, layout, initial_state)
    return y, state if output_final_state else None
