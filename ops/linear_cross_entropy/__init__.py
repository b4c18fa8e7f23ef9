"""The language model head's matrix product and its cross-entropy in one, so that full logits never exist."""

from types import ModuleType

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
    label_logit, log_sum_exp = vocabulary_slice(x, weight, labels, logit_soft_cap=logit_soft_cap, impl=impl)
    valid = labels != -100
    return torch.where(valid, log_sum_exp - label_logit, 0), torch.where(valid, log_sum_exp, 0)


def vocabulary_slice(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    start: int = 0,
    num_entries: int | None = None,
    logit_soft_cap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What a slice of the vocabulary adds to `linear_cross_entropy`, whose other arguments are the same.

    weight:       [N, D], the rows `start` ... `start` + N - 1 of the whole weight
    num_entries:  the rows of `weight` that are entries, 0 ... N: rows behind them are padding and count for nothing

    Returns, [...] each and in fp32 (float64 beside float64 inputs): label_logit, the label's logit where the label lies
    in the slice and 0 elsewhere; and log_sum_exp, the logarithm of the slice's sum of exponentials, -inf without
    entries. The slices of a vocabulary give log_z = logsumexp of their log_sum_exp, and nll = log_z - the sum of their
    label_logit. Differentiable as `linear_cross_entropy` is; where the label is -100, log_sum_exp still has its value.
    """
    check_dim("linear_cross_entropy", "weight", weight, "N D")
    check_shape("linear_cross_entropy", "x", x, "... D", *labels.shape, weight.shape[1])
    check_floating("linear_cross_entropy", x=x, weight=weight)
    if labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels have dtype {labels.dtype}; must be torch.int64")
    if logit_soft_cap is not None and logit_soft_cap <= 0:
        raise ValueError(f"linear_cross_entropy: logit_soft_cap is {logit_soft_cap}; must be > 0 or None")
    if num_entries is not None and not 0 <= num_entries <= len(weight):
        raise ValueError(f"linear_cross_entropy: num_entries is {num_entries}; must be 0 ... N = {len(weight)}")
    tier = _tier(resolve_impl("linear_cross_entropy", impl, x.device.type))
    rows = x.reshape(-1, x.shape[-1])
    label_logit, log_sum_exp = tier.vocabulary_slice(
        rows, weight[:num_entries], labels.flatten(), start, logit_soft_cap
    )
    return label_logit.view(labels.shape), log_sum_exp.view(labels.shape)


def _tier(impl: str) -> ModuleType:
    if impl == "triton":
        from ops.linear_cross_entropy import triton

        return triton
    return {"chunked": chunked, "reference": reference}[impl]
