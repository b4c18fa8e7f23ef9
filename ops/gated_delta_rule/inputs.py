"""What the gated delta rule and its summary ask of their arguments."""

from torch import Tensor

from ops.check import check_dim, check_floating, check_layout, check_log_decay, check_shape, check_strength
from ops.layout import Layout


def check_inputs(op: str, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, layout: Layout | None) -> None:
    """Raise ValueError unless shapes, dtypes and, while they are checked, values are those that the docstring of
    `ops.gated_delta_rule` names."""
    check_dim(op, "k", k, "B T H K")
    check_dim(op, "v", v, "B T HV V")
    batch, time, heads, _ = k.shape
    value_heads, value_dim = v.shape[2:]
    check_shape(op, "v", v, "B T HV V", batch, time, value_heads, value_dim)
    check_shape(op, "log_decay", log_decay, "B T HV", batch, time, value_heads)
    check_shape(op, "beta", beta, "B T HV", batch, time, value_heads)
    check_floating(op, k=k, v=v, log_decay=log_decay, beta=beta)
    check_layout(op, layout, batch, time)
    if value_heads % heads:
        raise ValueError(
            f"{op}: v has HV = {value_heads} heads; must be a multiple of k's H = {heads}: repeat those of q and k"
        )
    check_log_decay(op, log_decay)
    check_strength(op, k, beta)
