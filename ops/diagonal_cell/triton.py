"""A recurrence that is nonlinear in its state but acts on each channel alone, by Triton kernels.

One thread runs one (segment, row, channel) over its tokens. With one segment that is the sequential loop: `run` forward
and `adjoint` backward. Few channels leave a device empty, and then T is cut into S segments that run beside each other,
by multiple shooting (`ops.diagonal_cell.shooting` tells the method):

    forward   max_corrections + 1 times: `sweep` runs each segment from its guessed start and multiplies its Jacobians;
              `correct` passes over the segments, estimates the errors of the starts, and moves them. A channel whose
              largest error is within tolerance keeps its starts and is skipped from there on.
              Then `run` writes the outputs, of channels that did not converge in one piece from their first segment.
    backward  linear: `adjoint` reduces each segment to an affine map of the gradient at its end, `carry` passes over
              the segments, `adjoint` writes the gradients.

Nothing waits for the device: the number of launches is known beforehand. Kernels round as their source says (products
and sums are fused by tl.fma alone), so that a state has the same bits in `sweep` and `run` and for every S.

A step is latency, a chain of some 180 cycles forward. So the loads of the next tokens are issued, into registers,
before the tokens at hand are worked off; a compiler cannot move them up past the stores in between.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ops.diagonal_cell.defaults import MAX_CORRECTIONS, TOLERANCE
from ops.diagonal_cell.statistics import NUM_FIGURES, Statistics
from ops.diagonal_cell.triton_backward import adjoint, carry
from ops.diagonal_cell.triton_forward import correct, run, sweep
from ops.layout import Layout
from ops.precision import accumulation_dtype
from ops.rounding import INTERPRETED, TYPES

NUM_GATES = 3
# A program is one warp, as 16,384 channels are no more than a warp a scheduler. What a program of the interpreter costs
# does not depend on its width.
BLOCK = 1024 if INTERPRETED else 32
# Tokens of which the loads are in flight: with 12 bytes forward, 24 backward, and 4 warps they are the 16 KB and more
# that a multiprocessor's share of the bandwidth needs. They take twice their number of registers.
AHEAD_FORWARD, AHEAD_BACKWARD = (4, 4) if INTERPRETED else (16, 8)
# Segments of which the maps are in flight in a pass over segments.
AHEAD_SEGMENTS = 4 if INTERPRETED else 8
# From FULL channels on, the bytes that four sweeps read take as long as the sequential loop's latency. THREADS are four
# warps a scheduler, which hide each other's latency. Fewer segments do not pay for the sweeps, shorter ones not for the
# passes over segments.
FULL, THREADS = 2**12, 2**16
MIN_SEGMENTS, MIN_LENGTH = 8, 64


class Cell(NamedTuple):
    """A recurrence with three gates, as device functions of tuples of blocks.

    `state` is the one before a step; the last of its parts is the output. States are made of values within [-1, 1] and
    of the initial ones, which is what start states of segments are held to.

    Attributes:
        advance: (state, gates, weights) -> (next state, acts), acts being what the others can use again.
        slopes: (state, acts, weights) -> partial derivatives within the step, as `push` and `pull` take them.
        push: (tangent, slopes, weights) -> tangent of the next state: Jacobian times vector.
        pull: (gradient of the next state, slopes, weights) -> (gradient of the state, gradients of the gates).
        weigh: (gradients of the gates, state, next state, acts) -> what a token adds to the gradients of the weights.
        num_states, num_weights: of a channel.
    """

    advance: Any
    slopes: Any
    push: Any
    pull: Any
    weigh: Any
    num_states: int
    num_weights: int


class Cut(NamedTuple):
    """T tokens as `segments` of `length`, the last one shorter where it does not divide T."""

    segments: int
    length: int

    @classmethod
    def of(cls, time: int, segments: int) -> "Cut":
        """At most `segments`, so that their length is a multiple of the tokens that kernels take at once."""
        if segments == 1:
            return cls(1, time)
        ahead = max(AHEAD_FORWARD, AHEAD_BACKWARD)
        length = triton.cdiv(triton.cdiv(time, segments), ahead) * ahead
        return cls(triton.cdiv(time, length), length)


class Problem(NamedTuple):
    """What the forward kernels read, contiguous."""

    gates: Tensor
    weights: Tensor
    initial: Tensor
    restarts: Tensor | None
    cut: Cut
    sizes: tuple[int, ...]
    """time, segments, length, channels"""


def _bytes(restarts: Tensor | None) -> Tensor | None:
    return None if restarts is None else restarts.contiguous().view(torch.uint8)


def default_segments(batch: int, time: int, width: int) -> int:
    """S: a power of two such that the segments together fill a large GPU and none is short, else 1."""
    most = min(THREADS // (batch * width), time // MIN_LENGTH)
    if batch * width >= FULL or most < MIN_SEGMENTS:
        return 1
    return 1 << (most.bit_length() - 1)


class TritonForm:
    """Runs a cell; of one name only one can be registered."""

    def __init__(self, name: str, cell: Cell) -> None:
        self.name, self.cell = name, cell
        self.forward = self._register(
            "forward",
            self._forward,
            self._fake_forward,
            "(Tensor gates, Tensor weights, Tensor initial, Tensor? restarts, int segments, float tolerance, "
            "int max_corrections) -> (Tensor, Tensor, Tensor, Tensor)",
        )
        self.forward.register_autograd(self._differentiate, setup_context=self._keep)
        self.backward = self._register(
            "backward",
            self._backward,
            self._fake_backward,
            "(Tensor dy, Tensor dstate, Tensor gates, Tensor weights, Tensor initial, Tensor? restarts, Tensor y, "
            "Tensor kept, int segments) -> (Tensor, Tensor, Tensor)",
        )

    def __call__(
        self,
        gates: Tensor,
        weights: Tensor,
        layout: Layout | None,
        initial_state: Tensor | None,
        *,
        segments: int | None = None,
        tolerance: float | None = None,
        max_corrections: int | None = None,
        statistics: Statistics | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output [B, T, D] in gates' dtype and the last state [B, n, D].

        gates [B, T, 3, D], weights [W, D], initial_state [B, n, D]; options as in `ops.diagonal_lstm`, except that
        there are at most `segments`.
        """
        dtype = accumulation_dtype(gates, weights)
        if dtype == torch.float64 and not INTERPRETED:
            raise ValueError(f"{self.name}: impl 'triton' runs in fp32; got float64 inputs: choose impl 'chunked'")
        batch, time, _, width = gates.shape
        if initial_state is None:
            initial_state = gates.new_zeros(batch, self.cell.num_states, width, dtype=dtype)
        y, state, _, report = self.forward(
            gates,
            weights.to(dtype),
            initial_state.to(dtype),
            None if layout is None else layout.starts,
            min(segments or default_segments(batch, time, width), time),
            TOLERANCE[dtype] if tolerance is None else tolerance,
            MAX_CORRECTIONS if max_corrections is None else max_corrections,
        )
        if statistics is not None:
            statistics.report = report
        return y, state

    def _register(self, kind: str, function: Any, fake: Any, schema: str) -> Any:
        op = torch.library.custom_op(f"rondo::{self.name}_triton_{kind}", function, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    def _num_kept(self, gates: Tensor, weights: Tensor) -> int:
        """Of the parts of a state, those that the output does not hold exactly."""
        return self.cell.num_states - (gates.dtype == weights.dtype)

    def _constants(self, gates: Tensor) -> dict[str, Any]:
        """Of all kernels."""
        return {
            "NUM_STATES": self.cell.num_states,
            "D": gates.shape[3],
            "BLOCK": BLOCK,
            "num_warps": 1,
            "enable_fp_fusion": False,
        }

    def _forward(
        self,
        gates: Tensor,
        weights: Tensor,
        initial: Tensor,
        restarts: Tensor | None,
        segments: int,
        tolerance: float,
        max_corrections: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output [B, T, D], the last state [B, n, D], what the output lacks of the states [B, T, _, D], and the
        report of `ops.diagonal_cell.statistics`."""
        gates, weights, initial = (z.contiguous() for z in (gates, weights, initial))
        batch, time, _, width = gates.shape
        y = gates.new_empty(batch, time, width)
        kept = initial.new_empty(batch, time, self._num_kept(gates, weights), width)
        cut, channels = Cut.of(time, segments), batch * width
        problem = Problem(gates, weights, initial, _bytes(restarts), cut, (time, *cut, channels))
        report = torch.zeros(NUM_FIGURES, dtype=torch.float64, device=gates.device)
        report[0] = cut.segments
        constants = self._constants(gates) | {
            "ADVANCE": self.cell.advance,
            "NUM_GATES": NUM_GATES,
            "NUM_WEIGHTS": self.cell.num_weights,
            "AHEAD": AHEAD_FORWARD,
            "DTYPE": TYPES[weights.dtype],
        }
        with torch.cuda.device_of(gates):
            starts, rounds = initial, None
            if cut.segments > 1:
                starts, rounds = self._shoot(problem, tolerance, max_corrections, report, constants)
            grid = (triton.cdiv(cut.segments * channels, BLOCK),)
            constants["NUM_KEPT"] = kept.shape[2]
            run[grid](gates, weights, starts, rounds, problem.restarts, y, kept, *problem.sizes, **constants)
        parts = [*kept[:, -1].unbind(1), y[:, -1].to(initial.dtype)][: self.cell.num_states]
        return y, torch.stack(parts, dim=1), kept, report

    def _shoot(
        self, problem: Problem, tolerance: float, max_corrections: int, report: Tensor, constants: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Start states after an even and an odd number of corrections [2, S, B, n, D]; of each channel the number that
        it took, -1 if that was not enough, int32 [B, D]. Fills the report."""
        gates, weights, initial, restarts, cut, sizes = problem
        batch, count, width = initial.shape
        channels = batch * width
        both = initial.new_zeros(2, cut.segments, batch, count, width)
        both[:, 0] = initial
        rounds = torch.full((batch, width), -1, dtype=torch.int32, device=initial.device)
        error = initial.new_zeros(batch, width)
        maps = initial.new_empty(cut.segments - 1, batch, count + 1, count, width)
        derivatives = {"SLOPES": self.cell.slopes, "PUSH": self.cell.push}
        own = self._constants(gates) | {"AHEAD": AHEAD_SEGMENTS, "DTYPE": constants["DTYPE"]}
        for i in range(max_corrections + 1):
            here, moved = both[i % 2], both[(i + 1) % 2]
            sweep[(triton.cdiv((cut.segments - 1) * channels, BLOCK),)](
                gates, weights, here, rounds, restarts, maps, *sizes, **derivatives, **constants
            )
            correct[(triton.cdiv(channels, BLOCK),)](
                maps, here, moved, rounds, error, tolerance, i, cut.segments, channels, **own
            )
        stubborn = rounds < 0
        report[1] = torch.where(stubborn, max_corrections, rounds).max()
        report[2] = error.masked_fill(stubborn, 0).max()
        report[3] = stubborn.sum()
        return both, rounds

    def _fake_forward(
        self, gates: Tensor, weights: Tensor, initial: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (batch, time), width = gates.shape[:2], gates.shape[3]
        return (
            gates.new_empty(batch, time, width),
            initial.new_empty(initial.shape),
            initial.new_empty(batch, time, self._num_kept(gates, weights), width),
            gates.new_empty(NUM_FIGURES, dtype=torch.float64),
        )

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gates, weights, initial, restarts, segments, *_ = inputs
        y, _, kept, report = output
        ctx.save_for_backward(gates, weights, initial, restarts, y, kept)
        ctx.segments = segments
        ctx.mark_non_differentiable(kept, report)
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx: Any, dy: Tensor | None, dstate: Tensor | None, *_: None) -> tuple[Any, ...]:
        gates, weights, initial, restarts, y, kept = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        dstate = torch.zeros_like(initial) if dstate is None else dstate
        gradients = self.backward(dy, dstate, gates, weights, initial, restarts, y, kept, ctx.segments)
        return *gradients, None, None, None, None

    def _backward(
        self,
        dy: Tensor,
        dstate: Tensor,
        gates: Tensor,
        weights: Tensor,
        initial: Tensor,
        restarts: Tensor | None,
        y: Tensor,
        kept: Tensor,
        segments: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of gates, weights and initial state."""
        dy, dstate, gates, weights, initial = (z.contiguous() for z in (dy, dstate, gates, weights, initial))
        batch, time, _, width = gates.shape
        cut, channels = Cut.of(time, segments), batch * width
        maps = initial.new_empty(cut.segments - 1, batch, initial.shape[1] + 1, *initial.shape[1:])
        partial = weights.new_empty(cut.segments * batch, *weights.shape)
        dgates, dinitial = torch.empty_like(gates), torch.empty_like(initial)
        inputs = gates, weights, initial, _bytes(restarts), y, kept
        sizes = time, *cut, channels
        own = self._constants(gates)
        constants = own | {
            "ADVANCE": self.cell.advance,
            "SLOPES": self.cell.slopes,
            "PULL": self.cell.pull,
            "WEIGH": self.cell.weigh,
            "NUM_GATES": NUM_GATES,
            "NUM_WEIGHTS": self.cell.num_weights,
            "NUM_KEPT": kept.shape[2],
            "AHEAD": AHEAD_BACKWARD,
            "DTYPE": TYPES[weights.dtype],
        }
        with torch.cuda.device_of(gates):
            ends = dstate
            if cut.segments > 1:
                grid = (triton.cdiv((cut.segments - 1) * channels, BLOCK),)
                adjoint[grid](dy, None, *inputs, maps, dgates, partial, dinitial, *sizes, MAPS=True, **constants)
                ends = initial.new_empty(cut.segments, *initial.shape)
                grid = (triton.cdiv(channels, BLOCK),)
                carry[grid](maps, dstate, ends, cut.segments, channels, AHEAD=AHEAD_SEGMENTS, **own)
            grid = (triton.cdiv(cut.segments * channels, BLOCK),)
            adjoint[grid](dy, ends, *inputs, maps, dgates, partial, dinitial, *sizes, MAPS=False, **constants)
        return dgates, partial.sum(0), dinitial

    def _fake_backward(
        self, dy: Tensor, dstate: Tensor, gates: Tensor, weights: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return gates.new_empty(gates.shape), weights.new_empty(weights.shape), dstate.new_empty(dstate.shape)
