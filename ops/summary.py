"""The recurrences that offer their summary of a slice, by the op's name and as functions of the op's own tensors."""

from collections.abc import Callable

from torch import Tensor

from ops.affine import Affine
from ops.diagonal_gru.summary import diagonal_gru_summary
from ops.diagonal_lstm.summary import diagonal_lstm_summary
from ops.gated_delta_rule.summary import gated_delta_rule_summary
from ops.gated_linear_attention.summary import gated_linear_attention_summary
from ops.layout import Layout
from ops.linear_scan.summary import linear_scan_summary


def _without_queries(summary: Callable[..., Affine]) -> Callable[..., Affine]:
    """Queries read the state and leave it as it is."""

    def of_op(q: Tensor, *tensors: Tensor, layout: Layout | None = None) -> Affine:
        return summary(*tensors, layout=layout)

    return of_op


AFFINE_SUMMARIES: dict[str, Callable[..., Affine]] = {
    "gated_delta_rule": _without_queries(gated_delta_rule_summary),
    "gated_linear_attention": _without_queries(gated_linear_attention_summary),
    "linear_scan": linear_scan_summary,
}
"""Linear in the state: `summary(*tensors, layout=...)`."""

CELL_SUMMARIES: dict[str, Callable[..., Affine]] = {
    "diagonal_gru": diagonal_gru_summary,
    "diagonal_lstm": diagonal_lstm_summary,
}
"""Linearised around the state that the slice starts from: `summary(*tensors, layout=..., initial_state=...)`."""
