"""That slices of a vocabulary, combined, are the whole vocabulary's cross-entropy."""

import torch
from torch import Tensor

from ops import linear_cross_entropy
from ops.linear_cross_entropy import vocabulary_slice
from tests.ops.compare import DEVICE, FP32_UNIT, Inputs, assert_equal


def assert_slices_make_the_whole(
    inputs: Inputs, labels: Tensor, slices: int, *, impl: str, first: int = 0, tolerance: float = 1e-13
) -> None:
    """Equal slices, the last one padded with rows of 1e3; `first`, where the first one starts, is 0 unless wrong."""
    if inputs["x"].dtype == torch.float32:
        tolerance = 10 * FP32_UNIT
    labels = labels.to(DEVICE)
    entries = len(inputs["weight"])
    width = -(-entries // slices)
    x, weight = (tensor.detach().to(DEVICE).requires_grad_() for tensor in inputs.values())
    padding = torch.full((slices * width - entries, weight.shape[1]), 1e3, dtype=weight.dtype, device=DEVICE)
    padding.requires_grad_()
    parts = torch.cat([weight, padding]).split(width)
    results = [
        vocabulary_slice(
            x, part, labels, start=first + i * width, num_entries=max(0, min(width, entries - i * width)),
            logit_soft_cap=3.0, impl=impl,
        )
        for i, part in enumerate(parts)
    ]  # fmt: skip
    label_logit = torch.stack([logit for logit, _ in results]).sum(0)
    log_z = torch.stack([log_sum_exp for _, log_sum_exp in results]).logsumexp(0)
    found = gradients(
        torch.where(labels == -100, 0, log_z - label_logit), torch.where(labels == -100, 0, log_z), x, weight, padding
    )
    expected = gradients(*linear_cross_entropy(x, weight, labels, logit_soft_cap=3.0, impl=impl), x, weight, padding)
    assert_equal(found, expected, tolerance)


def gradients(nll: Tensor, log_z: Tensor, *leaves: Tensor) -> Inputs:
    """Both results, and the gradients of a sum of them weighted by token."""
    weights = torch.linspace(-1, 1, len(nll), dtype=nll.dtype, device=nll.device)
    grads = torch.autograd.grad((weights * nll + log_z).sum(), leaves, materialize_grads=True, allow_unused=True)
    return {"nll": nll, "log_z": log_z} | {f"d {i}": gradient for i, gradient in enumerate(grads)}
