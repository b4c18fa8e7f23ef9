"""rotary against transformers' Gemma, and the property that makes it a position embedding."""

import pytest
import torch
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding, apply_rotary_pos_emb

from ops import rotary
from tests.ops.compare import packed_positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_gemma_rotary(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 300, 4, 16, dtype=dtype), torch.randn(2, 300, 1, 16, dtype=dtype)
    positions = packed_positions(300, first=7)
    config = GemmaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
    cos, sin = GemmaRotaryEmbedding(config)(q.float(), positions)
    expected = apply_rotary_pos_emb(q.float(), k.float(), cos, sin, unsqueeze_dim=2)
    for ours, gemma in zip((rotary(q, positions), rotary(k, positions)), expected):
        torch.testing.assert_close(ours, gemma.to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    near = rotary(q, torch.tensor([[9]])) * rotary(k, torch.tensor([[4]]))
    far = rotary(q, torch.tensor([[1009]])) * rotary(k, torch.tensor([[1004]]))
    torch.testing.assert_close(near.sum(), far.sum())


def test_rotary_dim_leaves_the_rest() -> None:
    x, positions = torch.randn(2, 9, 3, 12), packed_positions(9)
    y = rotary(x, positions, theta=500.0, rotary_dim=8)
    torch.testing.assert_close(y[..., 8:], x[..., 8:], rtol=0, atol=0)
    torch.testing.assert_close(y[..., :8], rotary(x[..., :8], positions, theta=500.0))
    assert not torch.allclose(y[..., :8], rotary(x[..., :8], positions))


def test_gradcheck() -> None:
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary(x, torch.tensor([[3, 4, 0, 1]]), rotary_dim=4), x)


@pytest.mark.parametrize(
    ("shape", "positions", "rotary_dim", "message"),
    [
        ((2, 3, 8), (2, 3), None, r"x has shape \[2, 3, 8\]; must be \[B, T, H, K\]"),
        ((2, 3, 1, 8), (2, 4), None, "positions has shape"),
        ((2, 3, 1, 8), (2, 3), 3, "rotary_dim is 3; must be even"),
        ((2, 3, 1, 8), (2, 3), 10, "<= K = 8"),
        ((2, 3, 1, 7), (2, 3), None, "rotary_dim is 7"),
    ],
)
def test_bad_arguments(
    shape: tuple[int, ...], positions: tuple[int, ...], rotary_dim: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(torch.zeros(shape), torch.zeros(positions, dtype=torch.int64), rotary_dim=rotary_dim)
