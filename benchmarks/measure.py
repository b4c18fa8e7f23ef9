"""How benchmarks measure: contenders on the same inputs, alternating, behind a correctness gate, beside a floor."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Contender = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What no implementation can do without, in one pass."""

    bytes: float = 0
    flops: float = 0
    """Of matrix products."""
    transcendentals: float = 0
    """Evaluations of exp, tanh, sigmoid and their like."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            bytes=self.bytes + other.bytes,
            flops=self.flops + other.flops,
            transcendentals=self.transcendentals + other.transcendentals,
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """
    Attributes:
        name: op and shape.
        inputs: what every contender is called with; floating point ones get gradients.
        oracle: what the gate holds every contender against, called with fp32 copies of the inputs.
        contenders: by name, the first is ours.
        tolerance: of the gate, relative RMS of the output and of every gradient.
        forward, backward: the least work of each pass.
        forward_only: contenders without a backward.
    """

    name: str
    inputs: dict[str, Tensor]
    oracle: Contender
    contenders: dict[str, Contender]
    tolerance: float
    forward: Work
    backward: Work
    forward_only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Rates measured in this run: bytes a second of a copy (read and written), FLOP a second of a large matrix product
    in `dtype`, transcendentals a second of an in-cache exp, the cheapest of them."""

    copy: float
    flops: float
    transcendentals: float
    dtype: str

    def floor(self, work: Work) -> float:
        """Seconds below which no implementation gets on this machine: the slowest of its three resources."""
        return max(work.bytes / self.copy, work.flops / self.flops, work.transcendentals / self.transcendentals)


@dataclass
class Row:
    """Medians in ms over the rounds of one case; ratios are medians of each round's ratio of ours to the peer's."""

    case: str
    ours: str
    forward_ms: dict[str, float] = field(default_factory=dict)
    both_ms: dict[str, float] = field(default_factory=dict)
    forward_ratio: dict[str, float] = field(default_factory=dict)
    both_ratio: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    forward_floor_ms: float = 0.0
    both_floor_ms: float = 0.0


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: CUDA events on a GPU, the clock elsewhere."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_machine(device: torch.device, *, small: bool = False) -> Machine:
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    side = 256 if small else 8192 if gpu else 1024
    numbers = 2**18 if small else 2**28 if gpu else 2**25
    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    cached, out = (
        torch.randn(2**22 if gpu else 2**13, device=device),
        torch.empty(2**22 if gpu else 2**13, device=device),
    )
    repeats = 1 if gpu else 512

    def exp() -> None:
        for _ in range(repeats):
            torch.exp(cached, out=out)

    def best(function: Callable[[], Any]) -> float:
        return min(timed(function, device) for _ in range(10))

    return Machine(
        copy=8 * numbers / best(lambda: target.copy_(source)),
        flops=2 * side**3 / best(lambda: matrix @ matrix),
        transcendentals=repeats * cached.numel() / best(exp),
        dtype=str(dtype).removeprefix("torch."),
    )


def gradients(contender: Contender, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of a fixed random loss for every floating point input."""
    leaves = {name: z.detach().requires_grad_(z.is_floating_point()) for name, z in inputs.items()}
    y = contender(**leaves)
    y.backward(_cotangent(y))
    return {"output": y.detach()} | {f"d {name}": z.grad for name, z in leaves.items() if z.grad is not None}


def _cotangent(y: Tensor) -> Tensor:
    generator = torch.Generator(y.device).manual_seed(0)
    return torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)


def disagreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS of each; a gradient that is missing or not finite counts as infinitely wrong."""
    errors = {}
    for name, right in expected.items():
        if name not in found or not found[name].isfinite().all():
            errors[name] = float("inf")
        else:
            errors[name] = ((found[name].float() - right).norm() / right.norm().clamp_min(1e-30)).item()
    return errors


def gate(case: Case) -> Row:
    """A row with every contender's largest error; those that are wrong are named with what is wrong.

    Raises SystemExit where ours is.
    """
    ours = next(iter(case.contenders))
    row = Row(case.name, ours)
    wide = {name: z.float() if z.is_floating_point() else z for name, z in case.inputs.items()}
    expected = gradients(case.oracle, wide)
    for name, contender in case.contenders.items():
        if name in case.forward_only:
            with torch.no_grad():
                errors = disagreement({"output": contender(**case.inputs)}, {"output": expected["output"]})
        else:
            errors = disagreement(gradients(contender, case.inputs), expected)
        row.error[name] = max(errors.values())
        bad = {key: error for key, error in errors.items() if not error <= case.tolerance}
        if bad:
            row.wrong[name] = ", ".join(f"{key} {error:.1e}" for key, error in bad.items())
    if ours in row.wrong:
        raise SystemExit(f"{case.name}: {ours} is wrong ({row.wrong[ours]}); a wrong op is not timed")
    return row


def measure(case: Case, machine: Machine, device: torch.device, rounds: int) -> Row:
    """Gate, then `rounds` rounds of every right contender one after the other, forward alone and with its backward."""
    row = gate(case)
    right = {name: run for name, run in case.contenders.items() if name not in row.wrong}
    both = {name: run for name, run in right.items() if name not in case.forward_only}
    forward_times = _rounds({name: _forward(run, case.inputs) for name, run in right.items()}, device, rounds)
    both_times = _rounds({name: _both(run, case.inputs) for name, run in both.items()}, device, rounds)
    for times, ms, ratio in (
        (forward_times, row.forward_ms, row.forward_ratio),
        (both_times, row.both_ms, row.both_ratio),
    ):
        for name, seconds in times.items():
            ms[name] = 1e3 * statistics.median(seconds)
            if name != row.ours:
                ratio[name] = statistics.median(a / b for a, b in zip(times[row.ours], seconds))
    row.forward_floor_ms = 1e3 * machine.floor(case.forward)
    row.both_floor_ms = 1e3 * (machine.floor(case.forward) + machine.floor(case.backward))
    return row


def _rounds(functions: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function, device))
    return times


def _forward(contender: Contender, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """With what a later backward needs kept, as in training."""
    leaves = {name: z.detach().requires_grad_(z.is_floating_point()) for name, z in inputs.items()}
    return lambda: contender(**leaves)


def _both(contender: Contender, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    leaves = {name: z.detach().requires_grad_(z.is_floating_point()) for name, z in inputs.items()}
    dy = _cotangent(contender(**leaves))
    differentiable = [z for z in leaves.values() if z.requires_grad]
    return lambda: torch.autograd.grad(contender(**leaves), differentiable, dy)
