"""How causal_conv1d asks flash-linear-attention."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.causal_conv1d import fla, reference
from tests.ops.compare import layouts
from tests.ops.test_causal_conv1d import make_inputs


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("time", [2, 40])
def test_fla_gets_our_arguments(monkeypatch: pytest.MonkeyPatch, time: int, kind: str) -> None:
    """The mapping alone, on the CPU; flash-linear-attention's kernels run on a GPU."""
    from fla.modules.causal_conv1d import ops as kernels

    def imitation(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        initial_state: Tensor | None,
        output_final_state: bool,
        activation: str | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sequence by sequence, with states [N, D, W]."""
        assert output_final_state
        borders = None if cu_seqlens is None else cu_seqlens.tolist()
        parts = [*x] if borders is None else [x[0, a:b] for a, b in zip(borders, borders[1:])]
        outputs, states = [], []
        for i, part in enumerate(parts):
            before = None if initial_state is None else initial_state[i : i + 1, :, 1:].transpose(1, 2)
            y, state = reference.causal_conv1d(part[None], weight, bias, activation, None, before)
            outputs.append(y)
            states.append(pad(state.transpose(1, 2), (1, 0), value=1e9))  # nobody may read the oldest
        return torch.cat(outputs, dim=0 if borders is None else 1), torch.cat(states)

    monkeypatch.setattr(kernels, "causal_conv1d", imitation)
    inputs, layout = make_inputs(time, dtype=torch.float32), layouts(time)[kind]
    for kept in (inputs, {name: z for name, z in inputs.items() if name != "initial_state"}):
        leaves = {name: z.requires_grad_() for name, z in kept.items()}
        results = []
        for module in (reference, fla):
            y, state = module.causal_conv1d(
                leaves["x"], leaves["weight"], leaves["bias"], "silu", layout, leaves.get("initial_state")
            )
            loss = (y * y.detach().cos()).sum() + (state * state.detach().sin()).sum()
            results.append([y, state, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"torch\.float64; the implementation 'fla'"):
        fla.causal_conv1d(inputs["x"].double(), inputs["weight"], None, None, layout, None)
