"""The whole model: loss against torch's own, state, tied weights, initialisation, tables."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import AttentionConfig, LocalAttentionConfig
from models.mixers.hgrn2 import HGRN2Config
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig


def config(**changes: object) -> ModelConfig:
    values: dict = {
        "vocab_size": 61,
        "width": 32,
        "layers": ("rglru", "local_attention", "attention"),
        "mixers": MixerConfigs(
            rglru=RGLRUConfig(width=32, gate_blocks=2),
            local_attention=LocalAttentionConfig(heads=2, kv_heads=1, head_dim=16, window=4),
            attention=AttentionConfig(heads=2, kv_heads=2, head_dim=16),
        ),
        "mlp": MLPConfig(width=48),
    }
    return ModelConfig(**(values | changes))


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, 61, (2, 19), generator=generator) for _ in range(2))
    labels[0, 6] = labels[1, -1] = -100
    return ids, torch.cat([torch.arange(7), torch.arange(12)]).repeat(2, 1), labels


@pytest.mark.parametrize("changes", [{}, {"logit_soft_cap": None, "tie_embeddings": False, "scale_embeddings": False}])
def test_loss_is_the_cross_entropy_of_the_logits(changes: dict) -> None:
    model = LM(config(**changes))
    ids, positions, labels = batch()
    nll, log_z = model(ids, positions, labels)
    logits, state = model(ids, positions)
    assert state is None
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    torch.testing.assert_close(nll.flatten(), expected, rtol=1e-5, atol=1e-5)
    valid = labels >= 0
    torch.testing.assert_close(log_z[valid], logits.logsumexp(-1)[valid], rtol=1e-5, atol=1e-5)
    assert nll[~valid].abs().max() == 0


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_the_formula(tied: bool) -> None:
    settings = config(tie_embeddings=tied)
    model = LM(settings)
    assert settings.num_params() == model.num_params() == sum(p.numel() for p in model.parameters())
    table = model.layer_table(16)
    assert [row["impl"] for row in table if row["layer"] == "norms"] == ["chunked"]
    assert sum(row["parameters"] for row in table) == model.num_params()
    assert sum(row["flops_per_token"] for row in table) == model.flops_per_token(16)


def test_tied_gradient_reaches_the_embedding_from_both_ends() -> None:
    model = LM(config())
    ids, positions, labels = batch()
    model(ids, positions, labels)[0].sum().backward()
    never_read = next(i for i in range(61) if i not in ids)
    assert model.embed.weight.grad[never_read].abs().max() > 0, "the head's gradient is missing"
    assert "head.weight" not in dict(model.named_parameters())


def test_state_through_the_whole_model() -> None:
    model = LM(config()).double()
    ids, positions, _ = batch()
    whole, _ = model(ids, positions)
    state, pieces = model.init_state(2), []
    for start, end in ((0, 5), (5, 6), (6, 19)):
        logits, state = model(ids[:, start:end], positions[:, start:end], state=state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-10)


def test_initial_loss_and_stream_scale() -> None:
    """A fresh untied model is close to indifferent: unit logits add half a nat to log N."""
    model = LM(config(vocab_size=512, width=128, layers=("rglru",) * 12, tie_embeddings=False))
    ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    x = model.embed(ids)
    assert 0.9 < x.std() < 1.1
    logits = model(ids, torch.arange(64).expand(4, -1))[0].detach()
    labels = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert loss == pytest.approx(math.log(512) + 0.5, abs=0.15)
    assert logits.std().item() == pytest.approx(1.0, abs=0.1)


def test_no_parameter_is_left_uninitialised() -> None:
    first, again, other = LM(config(), seed=4), LM(config(), seed=4), LM(config(), seed=5)
    for name, parameter in first.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.embed.weight, other.embed.weight)
    with torch.device("meta"):
        assert LM(config()).num_params() == first.num_params()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "layers: empty"),
        ({"layers": ("rgrlu",)}, "'rgrlu' is no mixer; choose from .*; did you mean rglru?"),
        ({"post_norm": ("rgrlu",)}, "post_norm: 'rgrlu' is the mixer of no layer; choose from rglru, local_attention"),
        ({"mixers": MixerConfigs(rglru=RGLRUConfig(width=32, gate_blocks=2))}, "add them under mixers.local_attention"),
        ({"width": 0}, "width: 0; must be at least 1"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap: -1.0; must be positive"),
        (
            {"layers": ("hgrn2",), "mixers": MixerConfigs(hgrn2=HGRN2Config(heads=5))},
            "mixers.hgrn2.heads: 5; must divide the model's width .32.: choose e.g. 4",
        ),
        ({"norm_eps": -1.0}, "norm_eps: -1.0; must be positive"),
        ({"impl": {"linear_scna": "reference"}}, "impl.linear_scna: 'reference'; op: 'linear_scna' is not known"),
        ({"impl": {"linear_scan": "flex"}}, "impl.linear_scan: 'flex'; .* has no implementation 'flex'"),
    ],
)
def test_impossible_models_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_unavailable_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="linear_scan has no implementation 'nonsense'"):
        LM(config(impl={"linear_scan": "nonsense"}))
