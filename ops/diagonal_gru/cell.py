"""The GRU cell: its step, and by hand what the solver needs of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ops.diagonal_cell.cell import Advance, Channels, DiagonalCell, Linearised


def step(state: Channels, gates: Channels, weights: Channels) -> Channels:
    """h -> (h,); equations in `ops.diagonal_gru`."""
    (h,), (gate_z, gate_r, gate_c), (a_z, a_r, a_c) = state, gates, weights
    z = torch.sigmoid(a_z * h + gate_z)
    r = torch.sigmoid(a_r * h + gate_r)
    c = torch.tanh(a_c * (h * r) + gate_c)
    return ((1 - z) * h + z * c,)


class GRUCell(DiagonalCell):
    """Acts are what the nonlinearities gave: update z, reset r, candidate c."""

    num_acts = 3

    def bound(self, state: Tensor) -> Tensor:
        """h is a mean of tanh values and its start."""
        return state.abs().clamp_min(1)

    def stepper(self, weights: Tensor, gates: Tensor, acts: Tensor, states: Sequence[Tensor]) -> Advance:
        a_zr, a_c = weights[:2], weights[2]
        gates_zr, gates_c = gates[..., :2, :].unbind(2), gates[..., 2, :].unbind(2)
        zr = acts[..., :2, :].unbind(2)
        z, r, c = (x.unbind(2) for x in acts.unbind(3))
        (hiddens,) = (x.unbind(2) for x in states)

        def advance(i: int, state: Channels) -> Channels:
            h = state[0]
            torch.addcmul(gates_zr[i], a_zr, h.unsqueeze(2), out=zr[i]).sigmoid_()
            torch.addcmul(gates_c[i], a_c, h * r[i], out=c[i]).tanh_()
            return (torch.lerp(h, c[i], z[i], out=hiddens[i]),)

        return advance

    def linearise(
        self, weights: Tensor, gates: Tensor | None, acts: Tensor, before: Channels, after: Channels
    ) -> Linearised:
        (h,), (z, r, c), (a_z, a_r, a_c) = before, acts.unbind(-2), weights.unbind(0)
        remaining = 1 - z
        # Derivatives of h by the three pre-activations.
        update = (c - h).mul_(z).mul_(remaining)
        candidate = torch.addcmul(z, z * c, c, value=-1)
        reset = (candidate * a_c).mul_(r)  # of h by h in the candidate, until it is multiplied on
        jacobian = remaining.add_(reset)
        reset.mul_(1 - r).mul_(h)
        jacobian.addcmul_(update, a_z).addcmul_(reset, a_r)

        def pullback(dstates: Tensor, dgates: Tensor, dweights: Tensor) -> None:
            dh = dstates.squeeze(-2)
            for i, slope in enumerate((update, reset, candidate)):
                torch.mul(dh, slope, out=dgates[..., i, :])
            dweights[:2] += (dgates[..., :2, :] * h.unsqueeze(-2)).flatten(0, -3).sum(0)
            dweights[2] += (dgates[..., 2, :] * r).mul_(h).flatten(0, -2).sum(0)

        return Linearised(jacobian[..., None, None, :], pullback)


GRU = GRUCell("diagonal_gru", step, states=1, gates=3, weights=3)
