"""What gated linear attention and its summary ask of their arguments."""

from torch import Tensor

from ops.check import check_dim, check_floating, check_layout, check_log_decay, check_shape
from ops.layout import Layout


def check_inputs(op: str, k: Tensor, v: Tensor, log_decay: Tensor, layout: Layout | None) -> None:
    """Raise ValueError unless shapes, dtypes and, while they are checked, values are those that the docstring of
    `ops.gated_linear_attention` names."""
    check_dim(op, "k", k, "B T H K")
    check_dim(op, "v", v, "B T H V")
    check_shape(op, "v", v, "B T H V", *k.shape[:3], v.shape[3])
    check_shape(op, "log_decay", log_decay, "B T H K", *k.shape)
    check_floating(op, k=k, v=v, log_decay=log_decay)
    check_layout(op, layout, *k.shape[:2])
    check_log_decay(op, log_decay)
