"""How attention, local_attention and rotary ask flash-linear-attention: onto its own naive functions, on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.attention import fla, reference
from ops.rotary import fla as rotary_fla
from ops.rotary import reference as rotary_reference
from tests.ops.compare import layouts, packed_positions
from tests.ops.test_attention import make_inputs


@pytest.fixture
def naive_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import fla.ops.attn.parallel as theirs
    from fla.ops.attn.naive import naive_parallel_attn

    def imitation(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        scale: float | None = None,
        window_size: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        borders = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        assert cu_seqlens is None or len(q) == 1
        parts = (slice(*pair) for pair in zip(borders, borders[1:]))
        return torch.cat([naive_parallel_attn(q[:, i], k[:, i], v[:, i], scale, window_size)[0] for i in parts], 1)

    monkeypatch.setattr(theirs, "parallel_attn", imitation)


@pytest.mark.usefixtures("naive_attention")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["none", "packed", "continued"])
@pytest.mark.parametrize("time", [1, 40])
def test_attention_gets_our_arguments(time: int, kind: str, window: int | None) -> None:
    leaves = [z.requires_grad_() for z in make_inputs(time, dtype=torch.float32).values()]
    results = []
    for module in (reference, fla):
        o, state = module.attention(*leaves, 0.3, layouts(time)[kind], None, window)
        results.append([o, *state, *torch.autograd.grad((o * o.detach().cos()).sum(), leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "local_attention: float64 inputs; 'fla' computes in fp32: choose 'chunked'"),
        ({"width": 300}, "q has 300 features a head; 'fla' needs 256 at most; choose 'chunked'"),
        ({"previous": 4}, "initial_state holds 4 keys; 'fla' takes none; choose 'chunked' or 'flex'"),
    ],
)
def test_attention_refuses(change: dict[str, Any], message: str) -> None:
    q, k, v, *state = make_inputs(3, **{"dtype": torch.float32} | change).values()
    with pytest.raises(ValueError, match=message):
        fla.attention(q, k, v, 1.0, None, (state[0], state[1]) if state else None, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_gets_our_arguments(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 too, the angles are fp32, and what comes is rounded once."""
    import fla.modules.rotary as theirs
    from fla.modules.rotary.ops import rotary_embedding_ref

    def imitation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        assert x.dtype == cos.dtype == torch.float32
        return rotary_embedding_ref(x, cos, sin)

    monkeypatch.setattr(theirs, "rotary_embedding", imitation)
    x, dy = (torch.randn(2, 9, 3, 20).to(dtype) for _ in range(2))
    results = []
    for rotary, width in ((rotary_reference.rotary, torch.float32), (rotary_fla.rotary, dtype)):
        leaf = x.to(width).requires_grad_()
        y = rotary(leaf, packed_positions(9, first=7), 500.0, 12)
        results.append([z.to(dtype) for z in (y, *torch.autograd.grad(y, leaf, dy.to(width)))])
    torch.testing.assert_close(results[1], results[0])


def test_rotary_refuses() -> None:
    with pytest.raises(ValueError, match="'fla' computes in fp32: use 'reference'"):
        rotary_fla.rotary(torch.zeros(1, 1, 1, 4, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), 1e4, 4)
    with pytest.raises(ValueError, match="K = 300 features; the implementation 'fla' takes at most 256"):
        rotary_fla.rotary(torch.zeros(1, 1, 1, 300), torch.zeros(1, 1, dtype=torch.int64), 1e4, 4)
