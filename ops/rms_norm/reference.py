"""rms_norm as its formula, differentiated by autograd."""

from torch import Tensor
from torch.nn.functional import silu

from ops.precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool, gate: Tensor | None) -> Tensor:
    """y [..., D]; arguments as in `ops.rms_norm`."""
    dtype = accumulation_dtype(x)
    z = x.to(dtype)
    y = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.to(dtype) + one_plus_weight)
    return (y if gate is None else y * silu(gate.to(dtype))).to(x.dtype)
