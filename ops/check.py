"""The checks of shapes and dtypes that public ops make before any work; values are never read (that synchronises)."""

from torch import Tensor

from ops.layout import Layout


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


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor that is not None holds floating point numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; must be a floating point dtype")


def check_layout(op: str, layout: Layout | None, batch: int, time: int) -> None:
    """Raise ValueError unless `layout` is None or describes [B, T] tokens."""
    if layout is not None:
        check_shape(op, "layout.positions", layout.positions, "B T", batch, time)
