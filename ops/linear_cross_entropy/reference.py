"""linear_cross_entropy from its definition, with full logits."""

import torch
from torch import Tensor

from ops.precision import accumulation_dtype, product_dtype, without_autocast


def vocabulary_slice(x: Tensor, weight: Tensor, labels: Tensor, start: int, cap: float | None) -> tuple[Tensor, Tensor]:
    """label_logit and log_sum_exp [M] for x [M, D], weight [N, D], labels [M]; arguments as in the package's."""
    dtype, rounded = accumulation_dtype(x, weight), product_dtype(x, weight)
    with without_autocast(x):
        logits = x.to(rounded).to(dtype) @ weight.to(rounded).to(dtype).T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    columns = labels - start
    inside = (columns >= 0) & (columns < len(weight))
    padded = torch.cat([logits, logits.new_zeros(len(logits), 1)], dim=1)  # a column for the labels of other slices
    label_logit = padded.gather(-1, torch.where(inside, columns, len(weight))[:, None])[:, 0]
    return label_logit, logits.logsumexp(-1)
