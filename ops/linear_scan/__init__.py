"""The diagonal linear recurrence h_t = exp(log_decay_t) * h_{t-1} + x_t."""

from typing import Any

from torch import Tensor

from ops.check import check_dim, check_floating, check_layout, check_log_decay, check_shape
from ops.impl import resolve_impl
from ops.layout import Layout
from ops.linear_scan import chunked, reference
from ops.linear_scan.summary import linear_scan_summary

__all__ = ["linear_scan", "linear_scan_summary"]


def linear_scan(
    x: Tensor,
    log_decay: Tensor,
    *,
    layout: Layout | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(log_decay_t) * h_{t-1} + x_t for every channel; the recurrence of RG-LRU (Griffin, arXiv 2402.19427,
    equation 4), HGRN, minGRU and LRU.

    x:              [B, T, D]
    log_decay:      [B, T, D], natural logarithm of the decay, <= 0 (-inf forgets everything); may be wider than x
    layout:         at a document's first token h_{t-1} counts as 0, whatever `initial_state` says
    initial_state:  [B, D], h_{-1}; zeros by default

    Returns y [B, T, D] in x's dtype, and the last h [B, D] in fp32 if `output_final_state`, else None.
    The recurrence runs in fp32 (float64 for float64 inputs) in every implementation, under autocast too.
    Log decays are real; complex ones would fit the same signature, with a complex state and y.
    Raises ValueError for wrong shapes or dtypes and for an implementation that cannot run here.
    """
    check_dim("linear_scan", "x", x, "B T D")
    batch, time, width = x.shape
    check_shape("linear_scan", "log_decay", log_decay, "B T D", batch, time, width)
    check_shape("linear_scan", "initial_state", initial_state, "B D", batch, width)
    check_floating("linear_scan", x=x, log_decay=log_decay, initial_state=initial_state)
    check_layout("linear_scan", layout, batch, time)
    check_log_decay("linear_scan", log_decay)
    chosen = resolve_impl("linear_scan", impl, x.device.type)
    module: Any = {"chunked": chunked, "reference": reference}.get(chosen)
    if chosen == "triton":
        from ops.linear_scan import triton as module
    elif chosen == "fla":
        from ops.linear_scan import fla as module
    y, state = module.linear_scan(x, log_decay, layout, initial_state)
    return y, state if output_final_state else None
