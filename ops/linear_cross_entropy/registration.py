"""A tier's hand-written passes as registered ops, so that compilation and checkpointing pass through them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.precision import accumulation_dtype

Pair = tuple[Tensor, Tensor]


def register(tier: str, forward: Callable[..., Pair], backward: Callable[..., Pair]) -> Callable[..., Pair]:
    """The op (x [M, D], weight [N, D], labels [M], start, cap, narrow) -> label_logit [M], log_sum_exp [M].

    forward:  the same arguments and results; `narrow` is the dtype of the products' operands, and the other arguments
              are those of `ops.linear_cross_entropy.vocabulary_slice`
    backward: (the gradients of both results, log_sum_exp, and the arguments) -> the gradients of x and of weight
    """
    name = f"rondo::linear_cross_entropy_{tier}"
    forward_op = torch.library.custom_op(f"{name}_forward", forward, mutates_args=())
    backward_op = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())

    @forward_op.register_fake
    def _(x: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> Pair:
        dtype = accumulation_dtype(x, weight)
        return x.new_empty(labels.shape, dtype=dtype), x.new_empty(labels.shape, dtype=dtype)

    @backward_op.register_fake
    def _(dlabel_logit: Tensor, dlog_sum_exp: Tensor, log_sum_exp: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Pair:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
        x, weight, labels, *ctx.options = inputs
        ctx.save_for_backward(output[1], x, weight, labels)

    def gradients(ctx: Any, dlabel_logit: Tensor, dlog_sum_exp: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = backward_op(dlabel_logit, dlog_sum_exp, *ctx.saved_tensors, *ctx.options)
        return dx, dweight, None, None, None, None

    forward_op.register_autograd(gradients, setup_context=setup_context)
    return forward_op
