"""Linear attention whose matrix state decays by a factor of its own for every key channel."""

from typing import Any

from torch import Tensor

from ops.check import check_dim, check_floating, check_shape
from ops.gated_linear_attention import chunked, reference
from ops.gated_linear_attention.inputs import check_inputs
from ops.gated_linear_attention.summary import gated_linear_attention_summary
from ops.impl import resolve_impl
from ops.layout import Layout

__all__ = ["gated_linear_attention", "gated_linear_attention_summary"]


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    layout: Layout | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t for every head; the recurrence of
    gated linear attention (Yang et al., arXiv 2312.06635, equation 3) and of HGRN2 (arXiv 2404.07904).

    q, k:           [B, T, H, K]
    v:              [B, T, H, V]
    log_decay:      [B, T, H, K], natural logarithm of the decay, <= 0 (-inf forgets everything); may be wider than k
    scale:          K**-0.5 by default
    layout:         at a document's first token S_{t-1} counts as 0, whatever `initial_state` says
    initial_state:  [B, H, K, V], S_{-1}; zeros by default

    Returns o [B, T, H, V] in v's dtype, and the last S [B, H, K, V] in fp32 if `output_final_state`, else None.
    Everything runs in fp32 (float64 as soon as one input is float64) in every implementation, under autocast too.
    Raises ValueError for wrong shapes or dtypes and for an implementation that cannot run here.
    """
    op = "gated_linear_attention"
    check_dim(op, "q", q, "B T H K")
    check_shape(op, "k", k, "B T H K", *q.shape)
    check_inputs(op, k, v, log_decay, layout)
    batch, _, heads, keys = q.shape
    check_shape(op, "initial_state", initial_state, "B H K V", batch, heads, keys, v.shape[3])
    check_floating(op, q=q, initial_state=initial_state)
    scale = keys**-0.5 if scale is None else scale
    chosen = resolve_impl(op, impl, q.device.type)
    module: Any = {"chunked": chunked, "reference": reference}.get(chosen)
    if chosen == "triton":
        from ops.gated_linear_attention import triton as module
    elif chosen == "fla":
        from ops.gated_linear_attention import fla as module
    o, state = module.gated_linear_attention(q, k, v, log_decay, scale, layout, initial_state)
    return o, state if output_final_state else None
