"""What a slice of tokens does to the state before it, for sequence parallelism."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.affine import Affine
from ops.gated_delta_rule import chunked
from ops.gated_delta_rule.decays import layout_masks
from ops.gated_delta_rule.inputs import check_inputs
from ops.layout import Layout
from ops.precision import accumulation_dtype


def gated_delta_rule_summary(
    k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, layout: Layout | None = None
) -> Affine:
    """The affine map from the state before the tokens to the one after them, of `ops.gated_delta_rule`.

    Arguments as there. Returns transition [B, HV, K, K], the product of exp(log_decay_t) (I - beta_t k_t k_t^T) from
    the last token to the first and 0 where a document starts in the slice, and offset [B, HV, K, V], the state that
    the slice leaves from zero; both in fp32 (float64 for float64 inputs) and differentiable.

    One run of the recurrence without queries and outputs, from the state [0 | I] on values [v | 0]: the columns of a
    state do not see each other.
    Raises ValueError for wrong shapes or dtypes.
    """
    check_inputs("gated_delta_rule_summary", k, v, log_decay, beta, layout)
    batch, time, heads, key_dim = k.shape
    value_heads, value_dim = v.shape[2:]
    dtype = accumulation_dtype(k, v, log_decay, beta)
    size = chunked.chunk_size(time, k.shape[3])
    keys = chunked.cut(k, size, dtype, value_heads // heads)
    rest = (chunked.cut(z, size, dtype) for z in (pad(v, (0, key_dim)), log_decay, beta))
    start = pad(torch.eye(key_dim, dtype=dtype, device=v.device), (value_dim, 0)).repeat(batch, value_heads, 1, 1)
    _, state, *_ = chunked.forward(None, keys, *rest, start, layout_masks(layout, size, dtype))
    return Affine(state[..., value_dim:], state[..., :value_dim])
