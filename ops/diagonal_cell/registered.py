"""The ops of a cell's parallel form, registered so that torch.compile and activation checkpointing pass through them.

Loops whose length depends on the data lie inside them.
"""

from typing import Any

import torch
from torch import Tensor

from ops.diagonal_cell.adjoint import Gradients, backward
from ops.diagonal_cell.cell import DiagonalCell
from ops.diagonal_cell.defaults import shooting_of
from ops.diagonal_cell.shooting import Problem, solve
from ops.diagonal_cell.statistics import NUM_FIGURES
from ops.diagonal_cell.summary import linearise_slice
from ops.diagonal_cell.trajectory import Restarts, Trajectory

PROBLEM = "Tensor gates, Tensor weights, Tensor initial, Tensor? starts"
"""[B, T, G, D], [W, D] and [B, n, D] in the dtype of the recurrence; bool [B, T] or None."""


class RegisteredOps:
    """rondo::<name>_chunked_forward, _backward and _summary of a cell, callable as `forward` and `summary`."""

    def __init__(self, cell: DiagonalCell) -> None:
        self.cell = cell
        self.forward = self._register(
            "forward",
            self._forward,
            self._fake_forward,
            f"({PROBLEM}, int? segments, float? tolerance, int? max_corrections) -> "
            f"({', '.join(['Tensor'] * (3 + cell.num_states))})",
        )
        self.forward.register_autograd(self._differentiate_forward, setup_context=self._keep_forward)
        self.backward = self._register(
            "backward",
            self._backward,
            self._fake_backward,
            "(Tensor dy, Tensor dstate, Tensor weights, Tensor initial, Tensor? starts, Tensor? gates, Tensor acts, "
            "Tensor[] states) -> (Tensor, Tensor, Tensor)",
        )
        self.summary = self._register("summary", self._summary, self._fake_summary, f"({PROBLEM}) -> (Tensor, Tensor)")
        self.summary.register_autograd(self._differentiate_summary, setup_context=self._keep_summary)

    def _register(self, kind: str, function: Any, fake: Any, schema: str) -> Any:
        name = f"rondo::{self.cell.name}_chunked_{kind}"
        op = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    def _problem(self, gates: Tensor, weights: Tensor, initial: Tensor, starts: Tensor | None) -> Problem:
        return Problem(self.cell, weights, gates, initial, Restarts.of(starts, gates.dtype))

    def _forward(
        self,
        gates: Tensor,
        weights: Tensor,
        initial: Tensor,
        starts: Tensor | None,
        segments: int | None,
        tolerance: float | None,
        max_corrections: int | None,
    ) -> tuple[Tensor, ...]:
        """The output [B, T, D], the last state [B, n, D], the report, acts [B, T, A, D], the other states [B, T, D]."""
        how = shooting_of(gates, segments, tolerance, max_corrections)
        trajectory, report = solve(self._problem(gates, weights, initial, starts), how)
        others = list(trajectory.states)
        y = others.pop(self.cell.output)
        return y, trajectory.state(gates.shape[1] - 1), report, trajectory.acts, *others

    def _fake_forward(self, gates: Tensor, weights: Tensor, initial: Tensor, *others: Any) -> tuple[Tensor, ...]:
        batch, time, _, width = gates.shape
        states = [gates.new_empty(batch, time, width) for _ in range(self.cell.num_states)]
        report = gates.new_empty(NUM_FIGURES, dtype=torch.float64)
        acts = gates.new_empty(batch, time, self.cell.num_acts, width)
        return states[0], initial.new_empty(initial.shape), report, acts, *states[1:]

    def _keep_forward(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gates, weights, initial, starts, *_ = inputs
        y, _, report, acts, *others = output
        ctx.save_for_backward(weights, initial, starts, gates if self.cell.needs_gates else None, acts, y, *others)
        ctx.mark_non_differentiable(report, acts, *others)
        ctx.set_materialize_grads(False)

    def _differentiate_forward(self, ctx: Any, dy: Tensor | None, dstate: Tensor | None, *_: None) -> tuple[Any, ...]:
        weights, initial, starts, gates, acts, y, *others = ctx.saved_tensors
        others.insert(self.cell.output, y)
        dy = torch.zeros_like(y) if dy is None else dy
        dstate = torch.zeros_like(initial) if dstate is None else dstate
        gradients = self.backward(dy, dstate, weights, initial, starts, gates, acts, others)
        return *gradients, None, None, None, None

    def _backward(
        self,
        dy: Tensor,
        dstate: Tensor,
        weights: Tensor,
        initial: Tensor,
        starts: Tensor | None,
        gates: Tensor | None,
        acts: Tensor,
        states: list[Tensor],
    ) -> Gradients:
        trajectory = Trajectory(initial, acts, states)
        return backward(self.cell, dy, dstate, weights, gates, Restarts.of(starts, dy.dtype), trajectory)

    def _fake_backward(self, dy: Tensor, dstate: Tensor, weights: Tensor, *others: Any) -> Gradients:
        batch, time, width = dy.shape
        dgates = dy.new_empty(batch, time, self.cell.num_gates, width)
        return Gradients(dgates, weights.new_empty(weights.shape), dstate.new_empty(dstate.shape))

    def _summary(self, gates: Tensor, weights: Tensor, initial: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        return linearise_slice(self._problem(gates, weights, initial, starts))

    def _fake_summary(self, gates: Tensor, weights: Tensor, initial: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        batch, count, width = initial.shape
        return initial.new_empty(initial.shape), initial.new_empty(batch, count, count, width)

    def _keep_summary(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def _differentiate_summary(self, ctx: Any, dend: Tensor | None, _: None) -> tuple[Any, ...]:
        """Of the state after the slice; its trajectory is run again, as the forward pass keeps none."""
        if dend is None:
            return None, None, None, None
        gates, weights, initial, starts = ctx.saved_tensors
        with torch.no_grad():
            y, _, _, acts, *others = self.forward(gates, weights, initial, starts, None, None, None)
        others.insert(self.cell.output, y)
        here = gates if self.cell.needs_gates else None
        gradients = self.backward(torch.zeros_like(y), dend, weights, initial, starts, here, acts, others)
        return *gradients, None
