"""What a slice of tokens does to the state before it, for sequence parallelism."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.affine import Affine
from ops.gated_linear_attention.inputs import check_inputs
from ops.layout import Layout
from ops.precision import accumulation_dtype, without_autocast


def gated_linear_attention_summary(k: Tensor, v: Tensor, log_decay: Tensor, *, layout: Layout | None = None) -> Affine:
    """The affine map from the state before the tokens to the one after them, of `ops.gated_linear_attention`.

    Arguments as there. Returns transition [B, H, K], the product of all decays and 0 where a document starts in the
    slice, and offset [B, H, K, V], the state that the slice leaves from zero; both in fp32 (float64 for float64 inputs)
    and differentiable.

    The state left is one product, of keys that carry the decays after them and values: the log decays after a token
    are summed from the end, and tokens before the last document's first are left out, so that no sum crosses a start.
    Raises ValueError for wrong shapes or dtypes.
    """
    check_inputs("gated_linear_attention_summary", k, v, log_decay, layout)
    dtype = accumulation_dtype(k, v, log_decay)
    sums = log_decay.to(dtype).flip(1).cumsum(1).flip(1)  # over the token and those after it
    transition = sums[:, 0].exp()
    reach = pad(sums[:, 1:], (0, 0, 0, 0, 0, 1)).exp()
    if layout is not None:
        fed = layout.derive(_last_document)
        transition = transition.masked_fill(layout.starts.any(1)[:, None, None], 0)
        reach = reach.masked_fill(~fed[:, :, None, None], 0)
    with without_autocast(k):
        offset = torch.einsum("bthk,bthv->bhkv", reach * k, v.to(dtype))
    return Affine(transition, offset)


def _last_document(positions: Tensor) -> Tensor:
    """bool [B, T]: the tokens of each row's last document."""
    after = pad((positions == 0)[:, 1:], (0, 1)).flip(1).cumsum(1).flip(1)  # documents that start after the token
    return after == 0
