"""The language model head's matrix product and its cross-entropy in one, so that full logits never exist."""

import torch
from torch import Tensor

from ops.check import check_dim, check_floating, check_shape
from ops.impl import resolve_impl
from ops.linear_cross_entropy import chunked, reference


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, logit_soft_cap: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """nll = log_z - logits[label] and log_z = logsumexp(logits), for logits = weight x, or c * tanh(weight x / c).

    x:               [..., D]
    weight:          [N, D]
    labels:          int64 [...], in 0 ... N-1, or -100 where there is no target
    logit_soft_cap:  c > 0 bounds the logits to -c ... c (Gemma 2, arXiv 2408.00118); None for plain logits

    Returns nll and log_z, [...] each, in nats and fp32 (float64 beside float64 inputs), 0 where the label is -100.
    Both are differentiable with respect to x and weight. Under autocast the operands of the matrix products are rounded
    to its dtype, and everything is summed in fp32; the gradients have the dtypes of x and weight.
    Raises ValueError for wrong shapes, dtypes or cap and for an implementation that cannot run here.
    """
    check_dim("linear_cross_entropy", "weight", weight, "N D")
    check_shape("linear_cross_entropy", "x", x, "... D", *labels.shape, weight.shape[1])
    check_floating("linear_cross_entropy", x=x, weight=weight)
    if labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels have dtype {labels.dtype}; must be torch.int64")
    if logit_soft_cap is not None and logit_soft_cap <= 0:
        raise ValueError(f"linear_cross_entropy: logit_soft_cap is {logit_soft_cap}; must be > 0 or None")
    resolved = resolve_impl("linear_cross_entropy", impl, x.device.type)
    module = {"chunked": chunked, "reference": reference}[resolved]
    nll, log_z = module.linear_cross_entropy(x.reshape(-1, x.shape[-1]), weight, labels.flatten(), logit_soft_cap)
    return nll.view(labels.shape), log_z.view(labels.shape)
