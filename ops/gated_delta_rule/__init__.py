"""The gated delta rule, S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T."""

from typing import Any

from torch import Tensor

from ops.check import check_dim, check_floating, check_shape
from ops.gated_delta_rule import chunked, reference
from ops.gated_delta_rule.inputs import check_inputs
from ops.gated_delta_rule.summary import gated_delta_rule_summary
from ops.impl import resolve_impl
from ops.layout import Layout

__all__ = ["gated_delta_rule", "gated_delta_rule_summary"]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    layout: Layout | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """A matrix of memory a head that forgets, unlearns what it holds under a key, and learns a value instead:

        S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale * S_t^T q_t

    (Gated DeltaNet, arXiv 2412.06464, equation 10; DeltaNet, arXiv 2406.06484, where log_decay is 0.)

    q, k:           [B, T, H, K]; value head j uses query and key head j // (HV / H)
    v:              [B, T, HV, V], HV a multiple of H
    log_decay:      [B, T, HV], natural logarithm of the decay, <= 0 (-inf forgets everything); may be wider than v. One
                    number a head: a decay a key channel would be a fourth dimension K of the same argument
    beta:           [B, T, HV], with beta |k|^2 in 0 to 2, beyond which the recurrence itself grows
    scale:          of the output, K^-0.5 by default
    layout:         at a document's first token S_{t-1} counts as 0, whatever `initial_state` says
    initial_state:  [B, HV, K, V], S_{-1}; zeros by default

    Returns o [B, T, HV, V] in v's dtype, and the last S [B, HV, K, V] in fp32 if `output_final_state`, else None.
    The recurrence runs in fp32 (float64 for float64 inputs) in every implementation.
    Raises ValueError for wrong shapes or dtypes and for an implementation that cannot run here.
    """
    op = "gated_delta_rule"
    check_dim(op, "q", q, "B T H K")
    check_shape(op, "k", k, "B T H K", *q.shape)
    check_inputs(op, k, v, log_decay, beta, layout)
    batch, _, value_heads, values = v.shape
    check_shape(op, "initial_state", initial_state, "B HV K V", batch, value_heads, q.shape[3], values)
    check_floating(op, q=q, initial_state=initial_state)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = resolve_impl(op, impl, q.device.type)
    module: Any = {"chunked": chunked, "reference": reference}.get(chosen)
    if chosen == "triton":
        from ops.gated_delta_rule import triton as module
    elif chosen == "fla":
        from ops.gated_delta_rule import fla as module
    o, state = module.gated_delta_rule(q, k, v, log_decay, beta, scale, layout, initial_state)
    return o, state if output_final_state else None
