"""Tiles of the logits over tokens and vocabulary, and matrix products of narrow operands that are summed in fp32."""

from collections.abc import Iterator

import torch
from torch import Tensor


def tiles(tokens: int, entries: int, shape: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Slices of tokens and of vocabulary entries, of at most `shape`, that together cover all logits."""
    height, width = shape
    for m in range(0, tokens, height):
        for n in range(0, entries, width):
            yield slice(m, min(m + height, tokens)), slice(n, min(n + width, entries))


def operand(z: Tensor, narrow: torch.dtype, dtype: torch.dtype) -> Tensor:
    """z rounded to `narrow`, and back in `dtype` where no matrix product sums narrow operands in `dtype`."""
    z = z.to(narrow)
    return z if z.device.type == "cuda" else z.to(dtype)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, summed in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)
