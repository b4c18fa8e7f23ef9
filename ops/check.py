"""The checks that public ops make before any work: of shapes and dtypes always, of values only while `checked_values`
is active, as reading a value makes the host wait for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ops.layout import Layout, check_positions

_values_are_checked = False


@contextmanager
def checked_values() -> Iterator[None]:
    """While active, every op checks on the device that positions rise by one or restart at 0, that log decays are <= 0,
    and that beta |k|^2 <= 2, and raises ValueError otherwise. For looking into a run that diverges: it synchronises."""
    global _values_are_checked
    before, _values_are_checked = _values_are_checked, True
    try:
        yield
    finally:
        _values_are_checked = before


def check_log_decay(op: str, log_decay: Tensor) -> None:
    """Raise ValueError, while values are checked, unless every log decay is <= 0."""
    if _values_are_checked and not bool((log_decay <= 0).all()):
        raise ValueError(
            f"{op}: log_decay has a value of {float(log_decay.max())}; must be <= 0: the state would grow without bound"
        )


# beta * |k|^2 of keys normalised in fp32 or rounded to bf16 lies this little above its bound.
STRENGTH_ROUNDING = 0.02


def check_strength(op: str, k: Tensor, beta: Tensor) -> None:
    """Raise ValueError, while values are checked, unless 0 <= beta |k|^2 <= 2; k [B, T, H, K], beta [B, T, HV]."""
    if not _values_are_checked:
        return
    norms = k.float().square().sum(-1).repeat_interleave(beta.shape[-1] // k.shape[-2], dim=-1)
    strength = beta.float() * norms
    if not bool(((strength >= 0) & (strength <= 2 + STRENGTH_ROUNDING)).all()):
        low, high = strength.aminmax()
        raise ValueError(
            f"{op}: beta * |k|^2 lies between {float(low):.4g} and {float(high):.4g}; must lie between 0 and 2: "
            f"beyond that the state grows at every write. Normalise the keys"
        )


def check_shape(op: str, name: str, tensor: Tensor | None, letters: str, *sizes: int) -> None:
    """Raise ValueError unless `tensor` is None or has the shape `sizes`, called `letters` (such as "B T D")."""
    if tensor is not None and tensor.shape != sizes:
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)}; must be [{letters.replace(' ', ', ')}] = {list(sizes)}"
        )


def check_dim(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raise ValueError unless `tensor` has one dimension, of size >= 1, per letter of `letters` (such as "B T D")."""
    if tensor.dim() != len(letters.split()) or 0 in tensor.shape:
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)}; must be [{letters.replace(' ', ', ')}], each size >= 1"
        )


# Narrower floats promote to nothing, and complex numbers have no order.
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor that is not None holds floating point numbers of 16 bits or more."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype}; must be bfloat16, float16, float32 or float64: widen it before"
            )


def check_layout(op: str, layout: Layout | None, batch: int, time: int) -> None:
    """Raise ValueError unless `layout` is None or describes [B, T] tokens."""
    if layout is not None:
        check_shape(op, "layout.positions", layout.positions, "B T", batch, time)
        if _values_are_checked:
            check_positions(layout.positions)
