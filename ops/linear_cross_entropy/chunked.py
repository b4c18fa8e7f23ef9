"""linear_cross_entropy tile by tile over tokens and vocabulary; a hand-written backward recomputes the logits.

From forward to backward only log_z is kept beside the arguments: one number a token. All tiles share their memory: on a
CPU fresh memory costs as much as a third of the matrix product that fills it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.precision import accumulation_dtype, product_dtype

# Tokens and vocabulary entries of a tile: 4 MB of logits on a CPU, where larger ones leave the cache, 128 MB elsewhere.
CPU_TILE = (1024, 1024)
GPU_TILE = (4096, 8192)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, logit_soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """nll and log_z [M] for x [M, D], weight [N, D], labels [M]; arguments as in `ops.linear_cross_entropy`."""
    return LinearCrossEntropy.apply(x, weight, labels, logit_soft_cap, product_dtype(x, weight))


class LinearCrossEntropy(torch.autograd.Function):
    """(x [M, D], weight [N, D], labels [M], soft cap, dtype of the products' operands) -> nll [M], log_z [M]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, cap: float | None, narrow: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(x, weight)
        log_z = x.new_full(labels.shape, -torch.inf, dtype=dtype)
        target = torch.zeros_like(log_z)
        operands = _operand(x, narrow, dtype), _operand(weight, narrow, dtype)
        for m, n, (logits,) in _tiles(x, weight, dtype, num_buffers=1):
            _write_logits(logits, *operands, m, n, cap)
            column, inside = _columns(labels[m], n)
            target[m] += logits.gather(1, column)[:, 0] * inside
            peak = logits.amax(1, keepdim=True)
            log_z_of_tile = logits.sub_(peak).exp_().sum(1).log_().add_(peak[:, 0])
            log_z[m] = torch.logaddexp(log_z[m], log_z_of_tile)
        ctx.save_for_backward(x, weight, labels, log_z)
        ctx.cap, ctx.narrow = cap, narrow
        valid = labels != -100
        return torch.where(valid, log_z - target, 0), torch.where(valid, log_z, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll: Tensor, dlog_z: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, labels, log_z = ctx.saved_tensors
        cap, narrow, dtype = ctx.cap, ctx.narrow, log_z.dtype
        valid = labels != -100
        dnll, dlog_z = torch.where(valid, dnll, 0), torch.where(valid, dlog_z, 0)
        dx, dweight = torch.zeros_like(x, dtype=dtype), torch.zeros_like(weight, dtype=dtype)
        operands = _operand(x, narrow, dtype), _operand(weight, narrow, dtype)
        one = x.new_ones((), dtype=dtype)
        for m, n, (logits, slope) in _tiles(x, weight, dtype, num_buffers=2):
            _write_logits(logits, *operands, m, n, cap)
            if cap is not None:
                torch.addcmul(one, logits, logits, value=-(cap**-2), out=slope)
            dlogits = logits.sub_(log_z[m, None]).exp_().mul_((dnll + dlog_z)[m, None])
            column, inside = _columns(labels[m], n)
            dlogits.scatter_add_(1, column, -(dnll[m] * inside)[:, None])
            dlogits = _operand(dlogits if cap is None else dlogits.mul_(slope), narrow, dtype)
            _add_product(dx[m], dlogits, operands[1][n])
            _add_product(dweight[n], dlogits.T, operands[0][m])
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None, None


def _tiles(
    x: Tensor, weight: Tensor, dtype: torch.dtype, num_buffers: int
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Slices of tokens and of vocabulary that together cover all logits, and buffers of their size to write to."""
    height, width = CPU_TILE if x.device.type == "cpu" else GPU_TILE
    tokens, entries = len(x), len(weight)
    buffers = [x.new_empty(min(height, tokens), min(width, entries), dtype=dtype) for _ in range(num_buffers)]
    for m in range(0, tokens, height):
        for n in range(0, entries, width):
            rows, columns = slice(m, min(m + height, tokens)), slice(n, min(n + width, entries))
            yield rows, columns, [buffer[: rows.stop - m, : columns.stop - n] for buffer in buffers]


def _operand(z: Tensor, narrow: torch.dtype, dtype: torch.dtype) -> Tensor:
    """z rounded to `narrow`, and back in `dtype` where no matrix product sums narrow operands in `dtype`."""
    z = z.to(narrow)
    return z if z.device.type == "cuda" else z.to(dtype)


def _write_logits(logits: Tensor, x: Tensor, weight: Tensor, m: slice, n: slice, cap: float | None) -> None:
    if x.dtype == logits.dtype:
        torch.mm(x[m], weight[n].T, out=logits)
    else:
        logits.copy_(torch.mm(x[m], weight[n].T, out_dtype=logits.dtype))
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


def _columns(labels: Tensor, n: slice) -> tuple[Tensor, Tensor]:
    """The labels' columns [M, 1] in a tile of the vocabulary, and whether they are in it [M]; if not, any column."""
    return (labels[:, None] - n.start).clamp(0, n.stop - n.start - 1), (labels >= n.start) & (labels < n.stop)
