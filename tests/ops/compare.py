"""What the tests of all ops share: outputs with every gradient, tolerances that are earned, packing and splitting.

An op is called here as `op(**inputs, layout=layout, impl=impl) -> (output, final state)`; inputs named `initial_...`
belong to a row, `weight` and `bias` to all rows, and all others have a time dimension, their second.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from ops import Layout
from ops.impl import IMPLEMENTATIONS, resolve_impl

Inputs = dict[str, Tensor]
# Sizes around tiles, chunks and blocks: 1, the smallest, one less and one more than a power of two, primes.
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 257, 1025)
# Triton kernels are interpreted here unless there is a GPU, where the same tests run them compiled.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a test or a case that takes the interpreter long; a GPU always runs it.
SLOW = pytest.mark.slow if DEVICE == "cpu" else pytest.mark.skipif(False, reason="compiled")
# The longest of LENGTHS takes a time loop as long as all others together.
QUICK_LENGTHS = [*LENGTHS[:-1], pytest.param(LENGTHS[-1], marks=pytest.mark.slow)]
# Below one unit in the last place of fp32, two right implementations cannot be told apart.
FP32_UNIT = 1.2e-7
# What rounding a result to bf16 alone errs.
BF16_UNIT = 2.3e-3


def evaluate(op: Callable[..., Any], inputs: Inputs, *, seed: int = 0, **options: Any) -> Inputs:
    """Outputs, final states and the gradients of a random loss on all of them, by name; computed on DEVICE."""
    leaves = {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()}
    if options.get("layout") is not None:
        options["layout"] = Layout(options["layout"].positions.to(DEVICE))
    output, state = op(**leaves, **options)
    results = {"output": output}
    for i, tensor in enumerate(state if isinstance(state, tuple) else (state,)):
        if tensor is not None:
            results[f"state {i}"] = tensor
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (tensor * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(DEVICE)).sum()
        for tensor in results.values()
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    results |= {f"d {name}": gradient for name, gradient in zip(leaves, gradients)}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def runnable(op: str) -> list[str]:
    """The implementations of an op that can run here, besides the reference."""
    names = []
    for name in IMPLEMENTATIONS[op]:
        try:
            names.append(resolve_impl(op, name, DEVICE))
        except ValueError:
            continue
    return [name for name in names if name != "reference"]


def error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference relative to that of the expected tensor (or absolute where that is zero)."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference, scale = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / scale if scale > 0 else difference)


def assert_equal(actual: Inputs, expected: Inputs, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert all(value <= tolerance for value in errors.values()), errors


def assert_earned(
    op: Callable[..., Any], inputs: Inputs, *, factor: float = 2.0, impl: str = "chunked", **options: Any
) -> None:
    """Against the float64 reference, `impl` in fp32 errs at most `factor` times as much as the fp32 reference, and is
    nowhere infinite or NaN."""
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    exact = evaluate(op, {name: tensor.double() for name, tensor in inputs.items()}, impl="reference", **options)
    yardstick = evaluate(op, inputs, impl="reference", **options)
    found = evaluate(op, inputs, impl=impl, **options)
    for name, expected in exact.items():
        allowed = min(1e-4, max(FP32_UNIT, factor * error(yardstick[name], expected)))
        measured = error(found[name], expected)
        assert measured <= allowed, f"{name}: error {measured:.1e}, earned {allowed:.1e}"


def assert_earned_bf16(
    op: Callable[..., Any], inputs: Inputs, *, factor: float = 2.0, impl: str = "triton", **options: Any
) -> None:
    """Of bf16 inputs, and against the float64 reference on the same numbers, `impl` errs at most `factor` times as much
    as the chunked form whose products are bf16, and no more than one rounding to bf16 is always allowed."""
    inputs = {name: z if name.startswith(("log_", "initial_", "beta")) else z.bfloat16() for name, z in inputs.items()}
    exact = evaluate(op, {name: z.double() for name, z in inputs.items()}, impl="reference", **options)
    with BF16Products():
        yardstick = evaluate(op, inputs, impl="chunked", **options)
    found = evaluate(op, inputs, impl=impl, **options)
    for name, expected in exact.items():
        allowed = max(BF16_UNIT, factor * error(yardstick[name], expected))
        measured = error(found[name], expected)
        assert measured <= allowed, f"{name}: error {measured:.1e}, earned {allowed:.1e}"


class BF16Products(TorchDispatchMode):
    """While active, every matrix product rounds its operands to bf16 and sums in fp32, as tensor cores do; also inside
    this repository's registered ops."""

    PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::matmul")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rondo":
            with self:  # a mode is off while it handles an op
                return OPDEFS[func.name().split(".")[0]]._init_fn(*args, **(kwargs or {}))
        if func.name().split(".")[0].rstrip("_") in self.PRODUCTS:
            *rest, a, b = args
            args = (*rest, *(z.bfloat16().to(z.dtype) for z in (a, b)))
        return func(*args, **(kwargs or {}))


def extreme_decays(*shape: int) -> Tensor:
    """Log decays [..., channels] of nothing (0), all (-inf) and in between: at random, but in the first half of the
    channels, six at most, each alone."""
    values = torch.tensor([0.0, -torch.inf, -0.1, -3.0, -20.0, -1e4])
    log_decay = values[torch.randint(0, len(values), shape)]
    for channel, value in enumerate(values[: (shape[-1] + 1) // 2]):
        log_decay[..., channel] = value
    return log_decay


def packed_positions(time: int, *, first: int = 0, cuts: Sequence[int] = (1, 2, 16, 32, 33, 64, 96, 250)) -> Tensor:
    """int64 [2, T]: a row cut into documents at `cuts` (of length 1 among them, and ending at borders of chunks), and a
    row that is one document; `first` is the position of each row's first token."""
    positions = torch.arange(first, first + time).repeat(2, 1)
    for cut in cuts:
        positions[0, cut:] = torch.arange(max(0, time - cut))
    return positions


def layouts(time: int) -> dict[str, Layout | None]:
    return {
        "none": None,
        "packed": Layout(packed_positions(time)),
        "continued": Layout(packed_positions(time, first=7)),
    }


def assert_packed_equals_separate(op: Callable[..., Any], inputs: Inputs, *, impl: str, tolerance: float) -> None:
    """Documents packed in one row give the outputs, last state and gradients of the documents run one by one.

    The inputs have one row and no initial state.
    """
    time = next(tensor.shape[1] for name, tensor in inputs.items() if name not in ("weight", "bias"))
    positions = packed_positions(time)[:1]
    borders = [*(positions[0] == 0).nonzero().flatten().tolist(), time]
    documents = [slice(start, end) for start, end in zip(borders, borders[1:])]
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    generator = torch.Generator().manual_seed(0)

    def gradients(outputs: list[Tensor], state: Any) -> list[Tensor]:
        generator.manual_seed(0)
        states = state if isinstance(state, tuple) else (state,)
        kept = [torch.cat(outputs, dim=1), *(s[:, -min(3, s.shape[1]) :] for s in states)]
        loss = sum((z * torch.randn(z.shape, generator=generator, dtype=z.dtype)).sum() for z in kept)
        return [*kept, *torch.autograd.grad(loss, list(leaves.values()))]

    packed, packed_state = op(**leaves, layout=Layout(positions), impl=impl)
    separate, separate_state = [], None
    for document in documents:
        part = {n: z if n in ("weight", "bias") else z[:, document] for n, z in leaves.items()}
        output, separate_state = op(**part, layout=Layout(positions[:, document]), impl=impl)
        separate.append(output)
    for actual, expected in zip(gradients([packed], packed_state), gradients(separate, separate_state)):
        assert error(actual, expected) <= tolerance


def assert_split_equals_whole(
    op: Callable[..., Any], inputs: Inputs, *, cuts: Sequence[int], impl: str, tolerance: float, layout: Layout | None
) -> None:
    """Slices run one after the other, each from the state before, give the outputs, state and gradients of one call.

    `op` takes the state as `state` (None at first). Gradients pass through the states.
    """
    time = next(tensor.shape[1] for name, tensor in inputs.items() if name not in ("weight", "bias"))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}

    def run(borders: Sequence[int]) -> list[Tensor]:
        outputs, state = [], None
        for start, end in zip(borders, borders[1:]):
            part = {n: z if n in ("weight", "bias") else z[:, start:end] for n, z in leaves.items()}
            here = None if layout is None else Layout(layout.positions[:, start:end])
            output, state = op(**part, layout=here, state=state, impl=impl)
            outputs.append(output)
        kept = [torch.cat(outputs, dim=1), *(state if isinstance(state, tuple) else (state,))]
        generator = torch.Generator().manual_seed(0)
        loss = sum((z * torch.randn(z.shape, generator=generator, dtype=z.dtype)).sum() for z in kept)
        return [*(z.detach() for z in kept), *torch.autograd.grad(loss, list(leaves.values()))]

    for actual, expected in zip(run([0, *cuts, time]), run([0, time])):
        assert error(actual, expected) <= tolerance
