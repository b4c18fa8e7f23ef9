"""How linear_scan asks flash-linear-attention."""

import pytest
import torch
from torch import Tensor

from ops.linear_scan import fla, reference
from tests.ops.compare import layouts
from tests.ops.test_linear_scan import make_inputs


@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("time", [1, 2, 40])
def test_fla_gets_our_arguments(monkeypatch: pytest.MonkeyPatch, time: int, kind: str) -> None:
    """The mapping alone, on the CPU, onto its own time loop; its kernels run on a GPU."""
    import fla.ops.hgrn as theirs
    from fla.ops.hgrn.naive import naive_recurrent_hgrn

    def imitation(
        x: Tensor,
        g: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sequence by sequence, with states [N, D] in x's dtype."""
        assert output_final_state
        if cu_seqlens is None:
            return naive_recurrent_hgrn(x, g, initial_state, True)
        borders = cu_seqlens.tolist()
        outputs, states = [], []
        for i, (start, end) in enumerate(zip(borders, borders[1:])):
            state = None if initial_state is None else initial_state[i : i + 1]
            y, state = naive_recurrent_hgrn(x[:, start:end], g[:, start:end], state, True)
            outputs.append(y)
            states.append(state.to(x.dtype))
        return torch.cat(outputs, dim=1), torch.cat(states)

    monkeypatch.setattr(theirs, "fused_recurrent_hgrn", imitation)
    inputs, layout = make_inputs(time, dtype=torch.float32), layouts(time)[kind]
    for given in (inputs, {name: z for name, z in inputs.items() if name != "initial_state"}):
        results = []
        leaves = {name: z.requires_grad_() for name, z in given.items()}
        for module in (reference, fla):
            y, state = module.linear_scan(leaves["x"], leaves["log_decay"], layout, leaves.get("initial_state"))
            loss = (y * y.detach().cos()).sum() + (state * state.detach().sin()).sum()
            results.append([y, state, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_state_of_bf16_inputs_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    import fla.ops.hgrn as theirs

    def imitation(x: Tensor, g: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        return x, x[:, -1]

    monkeypatch.setattr(theirs, "fused_recurrent_hgrn", imitation)
    x = torch.randn(2, 3, 4).bfloat16()
    y, state = fla.linear_scan(x, -x.abs(), None, None)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_float64_is_refused() -> None:
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64 inputs; impl 'fla' computes in fp32: choose 'chunked'"):
        fla.linear_scan(x, x, None, None)
