"""Recurrences and fused operations: pure functions of tensors, without parameters.

The alphabet of shapes, used in docstrings and trailing comments of the whole repository:

    B  batch (rows)         K  key (query) features of a head     N  vocabulary
    T  time (tokens)        V  value features of a head           S  keys held in an attention state
    D  model width          W  window or convolution width        R  recurrent width
    H  heads                C  chunk (tokens)                     M  tokens of a batch, flattened
    G  groups of query heads that share one key and value head
    HV value heads

States are fp32 (float64 beside float64 inputs) whatever the dtype of the input, except for the keys and values
that attention keeps. A state and its gradient pass in both directions. `layout` tells where documents start; without
one every row is an unbroken sequence that continues from `initial_state`.
"""

from ops.affine import Affine
from ops.attention import attention
from ops.causal_conv1d import causal_conv1d
from ops.check import checked_values
from ops.diagonal_gru import diagonal_gru, diagonal_gru_summary
from ops.diagonal_lstm import diagonal_lstm, diagonal_lstm_summary
from ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_summary
from ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary
from ops.impl import check_impl, resolve_impl
from ops.layout import Layout
from ops.linear_cross_entropy import linear_cross_entropy
from ops.linear_scan import linear_scan, linear_scan_summary
from ops.local_attention import local_attention
from ops.rms_norm import rms_norm
from ops.rotary import rotary

__all__ = [
    "Affine",
    "Layout",
    "attention",
    "causal_conv1d",
    "check_impl",
    "checked_values",
    "diagonal_gru",
    "diagonal_gru_summary",
    "diagonal_lstm",
    "diagonal_lstm_summary",
    "gated_delta_rule",
    "gated_delta_rule_summary",
    "gated_linear_attention",
    "gated_linear_attention_summary",
    "linear_cross_entropy",
    "linear_scan",
    "linear_scan_summary",
    "local_attention",
    "resolve_impl",
    "rms_norm",
    "rotary",
]
