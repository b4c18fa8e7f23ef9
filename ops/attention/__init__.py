"""Causal softmax attention over documents, with grouped keys and values."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ops.attention import chunked, reference, sdpa
from ops.attention.inputs import State, check_inputs
from ops.impl import resolve_impl
from ops.layout import Layout


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    layout: Layout | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, State | None]:
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s over the keys s <= t of t's document (arXiv 1706.03762, equation 1).

    q:              [B, T, H, K]
    k, v:           [B, T, G, K]; G divides H, and head h reads group h // (H / G)
    scale:          K**-0.5 by default
    layout:         query t sees key s <= t iff t - s <= positions[t]
    initial_state:  (k, v), each [B, S, G, K]: the S keys and values before this call, cast to the dtype of k

    Returns o [B, T, H, K] and, if `output_final_state`, the keys and values [B, S+T, G, K], else None, all in the dtype
    of q, k, v.
    On a GPU "flex", "flash_attn" and "fla" skip what is not visible, and hold no mask of T x (S+T).
    Raises ValueError for wrong shapes or dtypes and for an implementation that cannot run here.
    """
    check_inputs("attention", q, k, v, layout, initial_state)
    attend = implementation(resolve_impl("attention", impl, q.device.type))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, state = attend(q, k, v, scale, layout, initial_state)
    return o, state if output_final_state else None


def implementation(impl: str) -> Callable[..., Any]:
    """The function (q, k, v, scale, layout, state) -> (o, state) that `impl` names; all but "sdpa" take a window."""
    if impl == "flex":
        from ops.attention import flex

        return flex.attention
    if impl == "flash_attn":
        from ops.attention import flash_attn

        return flash_attn.attention
    if impl == "fla":
        from ops.attention import fla

        return fla.attention
    return {"chunked": chunked.attention, "reference": reference.attention, "sdpa": sdpa.attention}[impl]
