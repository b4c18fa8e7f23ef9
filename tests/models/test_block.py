"""Where a block puts its norms, and the norms of attention's queries and keys."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.block import Block
from models.config import ModelConfig
from models.init import initialize
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import Attention, AttentionConfig
from models.mixers.placement import Placement
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig
from models.plain import from_plain
from ops import Layout, attention


def config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 31,
        "width": 16,
        "layers": ("rglru", "attention", "rglru"),
        "mixers": MixerConfigs(
            rglru=RGLRUConfig(width=16, gate_blocks=2), attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8)
        ),
        "mlp": MLPConfig(width=24),
    }
    return ModelConfig(**(values | changes))


def perturbed(module: torch.nn.Module) -> Any:
    initialize(module, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return module.double()


def inputs(width: int = 16) -> tuple[torch.Tensor, Layout]:
    x = torch.randn(2, 9, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, Layout(torch.cat([torch.arange(4), torch.arange(5)]).repeat(2, 1))


@pytest.mark.parametrize("post_norm", [(), ("attention",), ("rglru",)])
@pytest.mark.parametrize("kind", ["rglru", "attention"])
def test_norms_lie_before_or_behind(kind: str, post_norm: tuple[str, ...]) -> None:
    block = perturbed(Block(config(post_norm=post_norm), kind, Placement(width=16)))
    x, layout = inputs()
    found, _ = block(x, layout)
    if kind in post_norm:
        x = x + block.mixer_norm(block.mixer(x, layout)[0])
        x = x + block.mlp_norm(block.mlp(x))
    else:
        x = x + block.mixer(block.mixer_norm(x), layout)[0]
        x = x + block.mlp(block.mlp_norm(x))
    torch.testing.assert_close(found, x, rtol=0, atol=0)


def test_post_norm_is_by_mixer() -> None:
    model = LM(config(post_norm=("attention",)))
    assert [block.post_norm for block in model.blocks] == [False, True, False]
    assert model.num_params() == model.config.num_params() == LM(config()).num_params()


def test_post_norm_carries_the_state() -> None:
    model = perturbed(LM(config(post_norm=("attention", "rglru"))))
    ids, positions = torch.randint(0, 31, (2, 9)), torch.arange(9).expand(2, -1)
    whole, _ = model(ids, positions)
    state, pieces = model.init_state(2), []
    for piece, places in zip(ids.split((4, 1, 4), dim=1), positions.split((4, 1, 4), dim=1)):
        logits, state = model(piece, places.contiguous(), state=state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-10)


def test_a_stored_config_comes_back() -> None:
    """Lists, as JSON has them, become the tuples they were."""
    original = config(post_norm=("attention",))
    plain = dataclasses.asdict(original) | {"post_norm": ["attention"], "layers": list(original.layers)}
    assert from_plain(ModelConfig, plain) == original


@pytest.mark.parametrize("qk_norm", ["none", "full", "head"])
def test_norm_of_queries_and_keys(qk_norm: str) -> None:
    """Over all features of all heads, or over each head's, by torch's own norm; values are left alone."""
    settings = AttentionConfig(heads=4, kv_heads=2, head_dim=8, rotary_fraction=0.0, qk_norm=qk_norm, qk_norm_eps=1e-3)
    mixer = perturbed(Attention(settings, Placement(width=16)))
    x, layout = inputs()
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    if qk_norm == "full":
        q, k = (F.rms_norm(z, z.shape[-1:], n.weight, 1e-3) for z, n in ((q, mixer.q_norm), (k, mixer.k_norm)))
    q, k, v = (z.unflatten(-1, (-1, 8)) for z in (q, k, v))
    if qk_norm == "head":
        q, k = (F.rms_norm(z, (8,), n.weight, 1e-3) for z, n in ((q, mixer.q_norm), (k, mixer.k_norm)))
    expected = mixer.o_proj(attention(q, k, v, layout=layout)[0].flatten(-2))
    torch.testing.assert_close(mixer(x, layout)[0], expected, rtol=1e-12, atol=1e-12)
    assert settings.num_params(16) == sum(p.numel() for p in mixer.parameters())


def test_unknown_norm_of_queries_and_keys() -> None:
    with pytest.raises(ValueError, match="qk_norm: 'heads'; must be none, full or head"):
        AttentionConfig(heads=2, kv_heads=1, head_dim=8, qk_norm="heads")  # type: ignore[arg-type]
