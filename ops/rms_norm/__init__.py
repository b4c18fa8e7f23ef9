"""Root mean square norm, plain and gated."""

from typing import Any

from torch import Tensor

from ops.check import check_floating, check_shape
from ops.impl import resolve_impl
from ops.rms_norm import chunked, reference


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    one_plus_weight: bool = False,
    gate: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); with a gate, y * silu(gate).

    x:       [..., D]
    weight:  [D]; with `one_plus_weight` (Gemma) the factor is 1 + weight
    gate:    as x

    Computed in fp32 (float64 for float64 x); returns x's shape and dtype. Raises ValueError for wrong shapes or dtypes
    and for an implementation that cannot run here.
    """
    if x.dim() == 0:
        raise ValueError("rms_norm: x is a scalar; must be [..., D]")
    check_shape("rms_norm", "weight", weight, "D", x.shape[-1])
    check_shape("rms_norm", "gate", gate, "... D", *x.shape)
    check_floating("rms_norm", x=x, weight=weight, gate=gate)
    chosen = resolve_impl("rms_norm", impl, x.device.type)
    module: Any = {"chunked": chunked, "reference": reference}.get(chosen)
    if chosen == "triton":
        from ops.rms_norm import triton as module
    elif chosen == "fla":
        from ops.rms_norm import fla as module
    return module.rms_norm(x, weight, eps, one_plus_weight, gate)
