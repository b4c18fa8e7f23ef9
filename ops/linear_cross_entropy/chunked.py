"""linear_cross_entropy tile by tile over tokens and vocabulary; a hand-written backward recomputes the logits.

From forward to backward only the log-sum-exp is kept beside the arguments: one number a token. All tiles share their
memory: on a CPU fresh memory costs as much as a third of the matrix product that fills it.
"""

import torch
from torch import Tensor

from ops.linear_cross_entropy.registration import register
from ops.linear_cross_entropy.tiles import add_product, operand, tiles, write_product
from ops.precision import accumulation_dtype, product_dtype, without_autocast

# Tokens and vocabulary entries of a tile: 4 MB of logits on a CPU, where larger ones leave the cache, 128 MB elsewhere.
CPU_TILE = (1024, 1024)
GPU_TILE = (4096, 8192)


def vocabulary_slice(x: Tensor, weight: Tensor, labels: Tensor, start: int, cap: float | None) -> tuple[Tensor, Tensor]:
    """label_logit and log_sum_exp [M] for x [M, D], weight [N, D], labels [M]; arguments as in the package's."""
    return _vocabulary_slice(x, weight, labels, start, cap, product_dtype(x, weight))


def forward(
    x: Tensor, weight: Tensor, labels: Tensor, start: int, cap: float | None, narrow: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `register` asks of a forward pass."""
    dtype = accumulation_dtype(x, weight)
    log_sum_exp = x.new_full(labels.shape, -torch.inf, dtype=dtype)
    label_logit = torch.zeros_like(log_sum_exp)
    operands = operand(x, narrow, dtype), operand(weight, narrow, dtype)
    shape = _tile_shape(x)
    buffer = _buffer(x, weight, dtype)
    with without_autocast(x):
        for m, n in tiles(len(x), len(weight), shape):
            logits = _write_logits(buffer, *operands, m, n, cap)
            column, inside = _columns(labels[m] - start, n)
            label_logit[m] += logits.gather(1, column)[:, 0] * inside
            peak = logits.amax(1, keepdim=True)
            of_tile = logits.sub_(peak).exp_().sum(1).log_().add_(peak[:, 0])
            log_sum_exp[m] = torch.logaddexp(log_sum_exp[m], of_tile)
    return label_logit, log_sum_exp


def backward(
    dlabel_logit: Tensor,
    dlog_sum_exp: Tensor,
    log_sum_exp: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    start: int,
    cap: float | None,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What `register` asks of a backward pass."""
    dtype = log_sum_exp.dtype
    dx, dweight = x.new_zeros(x.shape, dtype=dtype), weight.new_zeros(weight.shape, dtype=dtype)
    operands = operand(x, narrow, dtype), operand(weight, narrow, dtype)
    shape = _tile_shape(x)
    buffers = [_buffer(x, weight, dtype) for _ in range(1 if cap is None else 2)]
    one = x.new_ones((), dtype=dtype)
    with without_autocast(x):
        for m, n in tiles(len(x), len(weight), shape):
            logits = _write_logits(buffers[0], *operands, m, n, cap)
            if cap is not None:
                slope = _cut(buffers[1], m, n)
                torch.addcmul(one, logits, logits, value=-(cap**-2), out=slope)
            dlogits = logits.sub_(log_sum_exp[m, None]).exp_().mul_(dlog_sum_exp[m, None])
            column, inside = _columns(labels[m] - start, n)
            dlogits.scatter_add_(1, column, (dlabel_logit[m] * inside)[:, None])
            dlogits = operand(dlogits if cap is None else dlogits.mul_(slope), narrow, dtype)
            add_product(dx[m], dlogits, operands[1][n])
            add_product(dweight[n], dlogits.T, operands[0][m])
    return dx.to(x.dtype), dweight.to(weight.dtype)


_vocabulary_slice = register("chunked", forward, backward)


def _tile_shape(x: Tensor) -> tuple[int, int]:
    return CPU_TILE if x.device.type == "cpu" else GPU_TILE


def _buffer(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    height, width = _tile_shape(x)
    return x.new_empty(min(height, len(x)), min(width, len(weight)), dtype=dtype)


def _cut(buffer: Tensor, m: slice, n: slice) -> Tensor:
    return buffer[: m.stop - m.start, : n.stop - n.start]


def _write_logits(buffer: Tensor, x: Tensor, weight: Tensor, m: slice, n: slice, cap: float | None) -> Tensor:
    logits = _cut(buffer, m, n)
    write_product(logits, x[m], weight[n].T)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _columns(labels: Tensor, n: slice) -> tuple[Tensor, Tensor]:
    """The labels' columns [M, 1] in a tile of the vocabulary, and whether they are in it [M]; if not, any column."""
    return (labels[:, None] - n.start).clamp(0, n.stop - n.start - 1), (labels >= n.start) & (labels < n.stop)
