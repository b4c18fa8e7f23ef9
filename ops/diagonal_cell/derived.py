"""A diagonal cell of which nothing is known but its step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ops.diagonal_cell.cell import Advance, Channels, DiagonalCell, Linearised, Step


class DerivedCell(DiagonalCell):
    """Its Jacobian and gradients are derived from the step by torch.func.

    That is done once, here, and kept as a list of elementwise operations: inside a registered op, under compilation
    and dispatch modes, torch.func cannot be called.
    """

    needs_gates = True

    def __init__(self, name: str, step: Step, *, states: int, gates: int, weights: int, output: int = 0) -> None:
        super().__init__(name, step, states=states, gates=gates, weights=weights, output=output)
        from torch.fx.experimental.proxy_tensor import make_fx  # takes long to import

        samples = [torch.rand(2) for _ in range(2 * states + gates + weights)]
        self._jacobian = make_fx(self._rows)(*samples[states:])
        self._pullback = make_fx(self._pulled)(*samples)

    def _rows(self, *inputs: Tensor) -> list[Tensor]:
        """Derivatives of each state after the step by each one before it; inputs are states, gates and weights."""
        before, others = inputs[: self.num_states], inputs[self.num_states :]
        gates, weights = others[: self.num_gates], others[self.num_gates :]
        after, pull, *_ = torch.func.vjp(lambda *z: tuple(self.step(z, gates, weights)), *before)
        rows: list[Tensor] = []
        for i in range(self.num_states):  # no channel sees another: one of ones gives the derivatives of all
            rows += pull(tuple(torch.full_like(z, float(i == j)) for j, z in enumerate(after)))
        return rows

    def _pulled(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradients of gates and weights, not summed over tokens; inputs are gradients and states, gates, weights."""
        count = self.num_states
        gradients, before, others = inputs[:count], inputs[count : 2 * count], inputs[2 * count :]
        cut = self.num_gates
        return torch.func.vjp(lambda *z: tuple(self.step(before, z[:cut], z[cut:])), *others)[1](gradients)

    def stepper(self, weights: Tensor, gates: Tensor, acts: Tensor, states: Sequence[Tensor]) -> Advance:
        rows, gate_steps, targets = weights.unbind(0), gates.unbind(2), [z.unbind(2) for z in states]

        def advance(i: int, before: Channels) -> Channels:
            return [z[i].copy_(after) for z, after in zip(targets, self.step(before, gate_steps[i].unbind(2), rows))]

        return advance

    def linearise(
        self, weights: Tensor, gates: Tensor | None, acts: Tensor, before: Channels, after: Channels
    ) -> Linearised:
        assert gates is not None
        inputs = (*before, *gates.unbind(-2), *weights.unbind(0))

        def pullback(dstates: Tensor, dgates: Tensor, dweights: Tensor) -> None:
            pulled = self._pullback(*dstates.unbind(-2), *inputs)
            for target, gradient in zip(dgates.unbind(-2), pulled):
                target.copy_(gradient)
            for target, gradient in zip(dweights, pulled[self.num_gates :]):
                target += gradient.expand(dstates.select(-2, 0).shape).flatten(0, -2).sum(0)

        rows = torch.stack(list(torch.broadcast_tensors(*self._jacobian(*inputs))), dim=-2)
        return Linearised(rows.unflatten(-2, (self.num_states, self.num_states)), pullback)
