"""linear_cross_entropy from its definition, with full logits."""

import torch
from torch import Tensor

from ops.precision import accumulation_dtype, product_dtype


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, logit_soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """nll and log_z [M] for x [M, D], weight [N, D], labels [M]; arguments as in `ops.linear_cross_entropy`."""
    dtype, rounded = accumulation_dtype(x, weight), product_dtype(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        logits = x.to(rounded).to(dtype) @ weight.to(rounded).to(dtype).T
    if logit_soft_cap is not None:
        logits = logit_soft_cap * torch.tanh(logits / logit_soft_cap)
    valid = labels != -100
    log_z = logits.logsumexp(-1)
    target = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(valid, log_z - target, 0), torch.where(valid, log_z, 0)
