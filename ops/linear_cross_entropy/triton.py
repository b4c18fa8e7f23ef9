"""linear_cross_entropy with cuBLAS for the matrix products and one pass of a kernel over each tile of logits.

A tile of fp32 logits is written by the product and read once: forward for its log-sum-exp and the labels' logits,
backward, where the same product is repeated, to become the gradient of the logits, in place, or in a narrow buffer
where the operands of the products are narrow. One row of a tile belongs to one warp, so that nothing is summed over
warps, and rows lie on grid axis 0, which is not limited to 65535.

The gradient cannot be formed in the forward pass: the caller weights tokens, and the weights of nll and log_z enter the
gradient of `weight` inside a sum over tokens. Four products instead of three are the price.

Logits are not rounded to bf16. It would halve the traffic of a tile, about 5 % of the time, and err by up to 2^-9 of a
logit: for labels drawn from the softmax of 8192 logits N(0, 16), a root mean square of 4e-3 of the nll, and 0.07 at
worst, where fp32 sums of the same operands err by 1e-7 of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.linear_cross_entropy.registration import register
from ops.linear_cross_entropy.tiles import add_product, operand, tiles, write_product
from ops.precision import accumulation_dtype, product_dtype, without_autocast

# Tokens and vocabulary entries of a tile: 268 MB of logits. What is read and written to sum the products over tiles
# grows with 1 / height + 1 / width, and a batch of up to 8192 tokens sums the gradient of the weight in one product.
TILE = (8192, 8192)
# Rows and columns that a program holds at once: a warp's row of 512 are 4 loads of 16 bytes a thread.
BT, BV, NUM_WARPS = 8, 512, 8
# Rows of a tile start at multiples of 256 bytes, whatever the vocabulary: tensor cores and wide loads ask for it.
ALIGNMENT = 64


def vocabulary_slice(x: Tensor, weight: Tensor, labels: Tensor, start: int, cap: float | None) -> tuple[Tensor, Tensor]:
    """label_logit and log_sum_exp [M] for x [M, D], weight [N, D], labels [M]; arguments as in the package's."""
    if x.is_cuda and torch.float64 in (x.dtype, weight.dtype):
        raise ValueError("linear_cross_entropy: the inputs are float64; 'triton' needs fp32 or below; choose 'chunked'")
    return _vocabulary_slice(x, weight, labels, start, cap, product_dtype(x, weight))


def forward(
    x: Tensor, weight: Tensor, labels: Tensor, start: int, cap: float | None, narrow: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `register` asks of a forward pass."""
    dtype = accumulation_dtype(x, weight)
    log_sum_exp = x.new_full(labels.shape, -torch.inf, dtype=dtype)
    label_logit = torch.zeros_like(log_sum_exp)
    operands = operand(x, narrow, dtype), operand(weight, narrow, dtype)
    labels = labels.contiguous()
    buffer = _buffer(x, weight, dtype)
    with without_autocast(x):
        for m, n in tiles(len(x), len(weight), TILE):
            logits = buffer[: m.stop - m.start, : n.stop - n.start]
            write_product(logits, operands[0][m], operands[1][n].T)
            rows = logits.shape[0]
            _summarise_kernel[(triton.cdiv(rows, BT),)](
                logits, labels[m], label_logit[m], log_sum_exp[m], *logits.shape, logits.stride(0), start + n.start,
                CAP=cap, BT=BT, BV=BV, num_warps=NUM_WARPS,
            )  # fmt: skip
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
    # The first product of a row of tiles writes to its sum, so that only sums of no products need their zeros.
    allocate = torch.Tensor.new_empty if len(x) and len(weight) else torch.Tensor.new_zeros
    dx, dweight = (allocate(z, z.shape, dtype=dtype) for z in (x, weight))
    operands = operand(x, narrow, dtype), operand(weight, narrow, dtype)
    per_token = labels.contiguous(), dlabel_logit.contiguous(), dlog_sum_exp.contiguous(), log_sum_exp
    buffer = _buffer(x, weight, dtype)
    # The interpreter cuts bits off where a GPU rounds: there `operand` rounds.
    narrow_buffer = _buffer(x, weight, narrow) if x.is_cuda and narrow != dtype else buffer
    with without_autocast(x):
        for m, n in tiles(len(x), len(weight), TILE):
            logits, dlogits = (z[: m.stop - m.start, : n.stop - n.start] for z in (buffer, narrow_buffer))
            write_product(logits, operands[0][m], operands[1][n].T)
            rows = logits.shape[0]
            _gradient_kernel[(triton.cdiv(rows, BT),)](
                logits, dlogits, *(z[m] for z in per_token), *logits.shape, logits.stride(0), start + n.start,
                CAP=cap, BT=BT, BV=BV, num_warps=NUM_WARPS,
            )  # fmt: skip
            dlogits = operand(dlogits, narrow, dtype)
            (write_product if n.start == 0 else add_product)(dx[m], dlogits, operands[1][n])
            (write_product if m.start == 0 else add_product)(dweight[n], dlogits.T, operands[0][m])
    return dx.to(x.dtype), dweight.to(weight.dtype)


_vocabulary_slice = register("triton", forward, backward)


def _buffer(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    width = min(TILE[1], triton.cdiv(len(weight), ALIGNMENT) * ALIGNMENT)
    return x.new_empty(min(TILE[0], len(x)), width, dtype=dtype)


@triton.jit
def _tanh(u):
    """tanh(u) and its derivative, neither of which overflows; the derivative is exact to rounding where tanh is 1."""
    e = tl.exp(-2 * tl.abs(u))
    magnitude = (1 - e) / (1 + e)
    tanh = tl.where(u < 0, -magnitude, magnitude)
    if u.dtype == tl.float32:  # 1 - e cancels where u is small: there the series, up to the terms below rounding
        s = tl.minimum(u * u, 1.0)
        series = u * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 + s * (-1382 / 155925))))))
        tanh = tl.where(s < 0.09, series, tanh)
    return tanh, 4 * e / ((1 + e) * (1 + e))


@triton.jit(do_not_specialize=["rows", "first"])
def _summarise_kernel(
    p_logits,
    p_labels,
    p_label_logit,
    p_log_sum_exp,
    rows,
    columns,
    stride,
    first,
    CAP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """BT rows of a tile [rows, columns] whose first column is entry `first` of the vocabulary, from left to right.

    Adds the tile to log_sum_exp [rows], and writes label_logit [rows] where the label lies in the tile.
    """
    o_row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_row = o_row < rows
    p_row = p_logits + o_row * stride
    peak = tl.full([BT], float("-inf"), p_logits.dtype.element_ty)
    total = tl.zeros([BT], p_logits.dtype.element_ty)
    for i_column in range(0, columns, BV):
        o_column = i_column + tl.arange(0, BV)
        m_column = o_column < columns
        b_logits = tl.load(p_row[:, None] + o_column[None, :], mask=m_row[:, None] & m_column[None, :], other=0)
        if CAP is not None:
            b_tanh, _ = _tanh(b_logits / CAP)
            b_logits = CAP * b_tanh
        b_logits = tl.where(m_column[None, :], b_logits, float("-inf"))  # finite in at least one column of every row
        higher = tl.maximum(peak, tl.max(b_logits, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(b_logits - higher[:, None]), 1)
        peak = higher
    of_tile = peak + tl.log(total)
    before = tl.load(p_log_sum_exp + o_row, mask=m_row, other=0)
    higher = tl.maximum(before, of_tile)
    after = higher + tl.log(tl.exp(before - higher) + tl.exp(of_tile - higher))
    tl.store(p_log_sum_exp + o_row, after, mask=m_row)

    o_label = tl.load(p_labels + o_row, mask=m_row, other=-1) - first
    m_label = m_row & (o_label >= 0) & (o_label < columns)
    b_label = tl.load(p_row + o_label, mask=m_label, other=0)
    if CAP is not None:
        b_tanh, _ = _tanh(b_label / CAP)
        b_label = CAP * b_tanh
    tl.store(p_label_logit + o_row, b_label, mask=m_label)


@triton.jit(do_not_specialize=["rows", "first"])
def _gradient_kernel(
    p_logits,
    p_dlogits,
    p_labels,
    p_dlabel_logit,
    p_dlog_sum_exp,
    p_log_sum_exp,
    rows,
    columns,
    stride,
    first,
    CAP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """dlogits of BT rows of a tile [rows, columns] whose first column is entry `first` of the vocabulary.

    Both buffers have the same stride, and may be one: a thread reads an element before it writes it.
    """
    o_row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_row = o_row < rows
    o_label = tl.load(p_labels + o_row, mask=m_row, other=-1) - first
    dlabel_logit = tl.load(p_dlabel_logit + o_row, mask=m_row, other=0)
    dlog_sum_exp = tl.load(p_dlog_sum_exp + o_row, mask=m_row, other=0)
    log_sum_exp = tl.load(p_log_sum_exp + o_row, mask=m_row, other=0)
    for i_column in range(0, columns, BV):
        o_column = i_column + tl.arange(0, BV)
        m_tile = m_row[:, None] & (o_column < columns)[None, :]
        o_tile = (o_row * stride)[:, None] + o_column[None, :]
        b_logits = tl.load(p_logits + o_tile, mask=m_tile, other=0)
        slope = 1.0
        if CAP is not None:
            b_tanh, slope = _tanh(b_logits / CAP)
            b_logits = CAP * b_tanh
        b_dlogits = dlog_sum_exp[:, None] * tl.exp(b_logits - log_sum_exp[:, None])
        b_dlogits += tl.where(o_label[:, None] == o_column[None, :], dlabel_logit[:, None], 0)
        b_dlogits *= slope
        tl.store(p_dlogits + o_tile, b_dlogits.to(p_dlogits.dtype.element_ty), mask=m_tile)
