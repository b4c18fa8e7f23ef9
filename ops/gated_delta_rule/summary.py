"""What a slice of tokens does to the state before it, for sequence parallelism."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.affine import Affine
from ops.check import check_dim, check_floating, check_layout, check_log_decay, check_shape, check_strength
from ops.gated_delta_rule import chunked
from ops.gated_delta_rule.decays import layout_masks
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
    check_dim("gated_delta_rule_summary", "k", k, "B T H K")
    check_dim("gated_delta_rule_summary", "v", v, "B T HV V")
    batch, time, heads, key_dim = k.shape
    value_heads, value_dim = v.shape[2:]
    check_shape("gated_delta_rule_summary", "v", v, "B T HV V", batch, time, value_heads, value_dim)
    check_shape("gated_delta_rule_summary", "log_decay", log_decay, "B T HV", batch, time, value_heads)
    check_shape("gated_delta_rule_summary", "beta", beta, "B T HV", batch, time, value_heads)
    check_floating("gated_delta_rule_summary", k=k, v=v, log_decay=log_decay, beta=beta)
    check_layout("gated_delta_rule_summary", layout, batch, time)
    if value_heads % heads:
        raise ValueError(
            f"gated_delta_rule_summary: v has HV = {value_heads} heads; must be a multiple of k's H = {heads}"
        )
    check_log_decay("gated_delta_rule_summary", log_decay)
    check_strength("gated_delta_rule_summary", k, beta)

    dtype = accumulation_dtype(k, v, log_decay, beta)
    size = chunked.chunk_size(time, k.shape[3])
    keys = chunked.cut(k, size, dtype, value_heads // heads)
    rest = (chunked.cut(z, size, dtype) for z in (pad(v, (0, key_dim)), log_decay, beta))
    start = pad(torch.eye(key_dim, dtype=dtype, device=v.device), (value_dim, 0)).repeat(batch, value_heads, 1, 1)
    _, state, *_ = chunked.forward(None, keys, *rest, start, layout_masks(layout, size, dtype))
    return Affine(state[..., value_dim:], state[..., :value_dim])
