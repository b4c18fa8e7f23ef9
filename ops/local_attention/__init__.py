"""Causal softmax attention over the last W tokens of a document."""

from torch import Tensor

from ops.attention import implementation
from ops.attention.inputs import State, check_inputs
from ops.impl import resolve_impl
from ops.layout import Layout
from ops.local_attention import sdpa


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    layout: Layout | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, State | None]:
    """`ops.attention` in which query t sees key s <= t iff t - s < window (sliding window, Griffin, arXiv 2402.19427).

    q:              [B, T, H, K]
    k, v:           [B, T, G, K]; G divides H, and head h reads group h // (H / G)
    window:         W >= 1 tokens, the query's own included
    scale:          K**-0.5 by default
    layout:         query t sees key s only if also t - s <= positions[t]
    initial_state:  (k, v), each [B, S, G, K]: the keys and values just before this call, cast to the dtype of k

    Returns o [B, T, H, K] and, if `output_final_state`, the last min(S+T, W-1) keys and values, else None, all in the
    dtype of q, k, v. Time and memory grow with T * W.
    Raises ValueError for wrong shapes, dtypes or window and for an implementation that cannot run here.
    """
    if window < 1:
        raise ValueError(f"local_attention: window is {window}; must be >= 1 (1 sees only the query's own token)")
    check_inputs("local_attention", q, k, v, layout, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    resolved = resolve_impl("local_attention", impl, q.device.type)
    attend = sdpa.local_attention if resolved == "sdpa" else implementation(resolved)
    o, (keys, values) = attend(q, k, v, scale, layout, initial_state, window)
    if not output_final_state:
        return o, None
    oldest = max(0, keys.shape[1] - window + 1)
    return o, (keys[:, oldest:], values[:, oldest:])
