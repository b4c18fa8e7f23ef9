"""What a slice of tokens does to the state before it, for sequence parallelism."""

from torch import Tensor

from ops.affine import Affine
from ops.check import check_dim, check_floating, check_layout, check_log_decay, check_shape
from ops.impl import resolve_impl
from ops.layout import Layout
from ops.linear_scan import chunked

OP = "linear_scan_summary"


def linear_scan_summary(x: Tensor, log_decay: Tensor, *, layout: Layout | None = None, impl: str = "auto") -> Affine:
    """The affine map from the state before the tokens to the one after them, of `ops.linear_scan`.

    x, log_decay, layout:  as there
    impl:                  "auto" (the choice for linear_scan), "chunked" or "triton"

    Returns transition [B, D], the product of all decays and 0 where a document starts in the slice, and offset [B, D],
    the state that the slice leaves from zero; both in fp32 (float64 for float64 inputs) and differentiable. The forward
    writes nothing for single tokens; the backward computes the states of all tokens.
    Raises ValueError for wrong shapes or dtypes and for an implementation that cannot run here.
    """
    check_dim(OP, "x", x, "B T D")
    check_shape(OP, "log_decay", log_decay, "B T D", *x.shape)
    check_floating(OP, x=x, log_decay=log_decay)
    check_layout(OP, layout, x.shape[0], x.shape[1])
    check_log_decay(OP, log_decay)
    chosen = resolve_impl("linear_scan", impl, x.device.type)
    if chosen == "triton":
        from ops.linear_scan import triton

        return Affine(*triton.linear_scan_summary(x, log_decay, layout))
    if chosen != "chunked":
        raise ValueError(f"impl: {OP} has no implementation {chosen!r}; choose one of auto, chunked, triton")
    return Affine(*chunked.linear_scan_summary(x, log_decay, layout))
