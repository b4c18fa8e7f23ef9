"""Our Griffin against one that nobody here wrote: transformers' RecurrentGemma with the same weights."""

import dataclasses
from collections.abc import Iterable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.hf.recurrentgemma import differences, from_hf_weights, hf_name, to_hf_config, to_hf_weights
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.rglru import RGLRU
from models.mlp import MLPConfig
from ops import Layout
from tests.models.griffin import griffin, griffin_config

TOLERANCE = 1e-4
ROWS, LENGTH = 2, 23  # several windows of 5 long


def close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().item()
    assert scale > 0, f"{what} is zero everywhere: nothing is compared"
    assert (found - expected).abs().max().item() <= TOLERANCE * scale, what


def theirs_of(model: LM) -> nn.Module:
    """RecurrentGemma with the weights of `model`."""
    from transformers import RecurrentGemmaForCausalLM

    twin = RecurrentGemmaForCausalLM(to_hf_config(model.config, pad_token_id=None)).eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    missing, unexpected = twin.load_state_dict(to_hf_weights(weights, model.config.layers), strict=False)
    assert missing == ["lm_head.weight"], "the head is tied"
    assert not unexpected
    return twin


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_document_a_row(length: int = LENGTH) -> Tensor:
    return torch.arange(length).expand(ROWS, -1)


@pytest.fixture(scope="module")
def pair() -> tuple[LM, nn.Module]:
    model = griffin()
    return model, theirs_of(model)


@pytest.fixture(autouse=True)
def no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "pair" in request.fixturenames:
        for module in request.getfixturevalue("pair"):
            module.zero_grad()


def test_recurrent_block(pair: tuple[LM, nn.Module]) -> None:
    """Projections, convolution, gates, recurrence; outputs and every gradient, the input's included."""
    model, twin = pair
    mixer, block = model.blocks[1].mixer, twin.model.layers[1].temporal_block
    results = []
    for forward in (
        lambda x: mixer(x, Layout(one_document_a_row()))[0],
        lambda x: block(x, one_document_a_row(), None, use_cache=False)[0],
    ):
        x = normal(ROWS, LENGTH, 32, seed=1).requires_grad_()
        y = forward(x)
        (y * normal(*y.shape, seed=2)).sum().backward()
        results.append((y, x.grad))
    (y, dx), (expected_y, expected_dx) = results
    close(y, expected_y, "output")
    close(dx, expected_dx, "gradient of the input")
    prefix = "blocks.1.mixer."
    names = [prefix + name for name, _ in mixer.named_parameters()]
    found, expected = gradients(model), from_hf_weights(gradients(twin), names, model.config.layers)
    assert len(names) == 13
    for name in names:
        close(found[name], expected[name], name)


@pytest.mark.parametrize("lengths", [(23,), (1, 6, 1, 1, 14), (9, 14)], ids=str)
def test_rg_lru_with_restarting_positions(pair: tuple[LM, nn.Module], lengths: tuple[int, ...]) -> None:
    """The gated recurrence alone, where documents begin inside a row."""
    model, twin = pair
    mixer, lru = model.blocks[0].mixer, twin.model.layers[0].temporal_block.rg_lru
    assert isinstance(mixer, RGLRU)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(ROWS, -1)

    def ours(h: Tensor) -> Tensor:
        layout = Layout(positions)
        return mixer.core(*mixer.gated(h, layout), layout=layout, initial_state=None, output_final_state=False)[0]

    def theirs(h: Tensor) -> Tensor:
        lru.recurrent_states = None
        return lru(h, positions)

    results = []
    for forward in (ours, theirs):
        h = normal(ROWS, LENGTH, 32, seed=3).requires_grad_()
        y = forward(h)
        (y * normal(*y.shape, seed=4)).sum().backward()
        results.append((y, h.grad))
    close(results[0][0], results[1][0], "output")
    close(results[0][1], results[1][1], "gradient of the input")
    names = [f"blocks.0.mixer.{n}" for n, _ in mixer.named_parameters() if "gate." in n or n == "decay_param"]
    found, expected = gradients(model), from_hf_weights(gradients(twin), names, model.config.layers)
    assert len(names) == 5
    for name in names:
        close(found[name], expected[name], name)


def test_whole_model(pair: tuple[LM, nn.Module]) -> None:
    """Logits, loss and the gradient of every parameter, the tied matrix's from both its uses."""
    model, twin = pair
    tokens = torch.randint(model.config.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    input_ids, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, 4:7] = -100
    logits, _ = model(input_ids, one_document_a_row())
    expected_logits = twin(input_ids, use_cache=False).logits
    close(logits, expected_logits, "logits")
    nll, _ = model(input_ids, one_document_a_row(), labels)
    expected_nll = F.cross_entropy(expected_logits.transpose(1, 2), labels, reduction="none")
    close(nll, expected_nll, "loss")
    nll.sum().backward()
    expected_nll.sum().backward()
    names = [name for name, _ in model.named_parameters()]
    found, expected = gradients(model), from_hf_weights(gradients(twin), names, model.config.layers)
    for name in names:
        close(found[name], expected[name], name)


@pytest.mark.parametrize("change", [{"window": 4}, {"window": 6}, {"rotary_fraction": 1.0}, {"rotary_theta": 100.0}])
def test_the_comparison_sees_attention_settings(pair: tuple[LM, nn.Module], change: dict) -> None:
    model, twin = pair
    config = model.config
    mixers = dataclasses.replace(
        config.mixers, local_attention=dataclasses.replace(config.mixer("local_attention"), **change)
    )
    mutant = LM(dataclasses.replace(config, mixers=mixers))
    mutant.load_state_dict(model.state_dict())
    input_ids = torch.randint(61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), pytest.raises(AssertionError, match="logits"):
        close(mutant(input_ids, one_document_a_row())[0], twin(input_ids, use_cache=False).logits, "logits")


def test_names_map_both_ways(pair: tuple[LM, nn.Module]) -> None:
    model, twin = pair
    layers = model.config.layers
    weights = {name: p.detach() for name, p in model.named_parameters()}
    there = to_hf_weights(weights, layers)
    assert there.keys() == {name for name, _ in twin.named_parameters()}
    back = from_hf_weights(there, list(weights), layers)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert hf_name("blocks.2.mixer.o_proj.bias", layers) == "model.layers.2.temporal_block.o_proj.bias"
    with pytest.raises(KeyError):
        hf_name("head.weight", layers)


def test_griffin_has_no_differences() -> None:
    assert differences(griffin_config()) == []


def changed(**settings: object) -> Iterable[str]:
    """The keys that keep the tiny Griffin with other settings from being a RecurrentGemma."""
    config = griffin_config()
    mixers: dict[str, object] = {kind: config.mixer(kind) for kind in ("rglru", "local_attention")}
    for kind in mixers:
        mixers[kind] = dataclasses.replace(mixers[kind], **settings.pop(kind, {}))  # type: ignore[type-var]
    return [
        line.split(":")[0]
        for line in differences(dataclasses.replace(config, mixers=MixerConfigs(**mixers), **settings))
    ]


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"rglru": {"gate_blocks": 8}}, ["model.mixers.rglru.gate_blocks"]),
        ({"rglru": {"width": 48}}, ["model.mixers.rglru.width"]),
        ({"local_attention": {"head_dim": 16}}, ["model.mixers.local_attention.head_dim"]),
        ({"local_attention": {"output_bias": False}}, ["model.mixers.local_attention.output_bias"]),
        ({"local_attention": {"qk_norm": "head"}}, ["model.mixers.local_attention.qk_norm"]),
        ({"post_norm": ("rglru",)}, ["model.post_norm"]),
        ({"logit_soft_cap": None, "tie_embeddings": False}, ["model.tie_embeddings", "model.logit_soft_cap"]),
        ({"scale_embeddings": False}, ["model.scale_embeddings"]),
        ({"norm_one_plus_weight": False}, ["model.norm_one_plus_weight"]),
        ({"mlp": MLPConfig(width=44, activation="silu", bias=False)}, ["model.mlp.activation", "model.mlp.bias"]),
    ],
    ids=str,
)
def test_differences_name_their_keys(settings: dict, keys: list[str]) -> None:
    assert sorted(changed(**settings)) == sorted(keys)


def test_other_mixers_are_named() -> None:
    from models.mixers.attention import AttentionConfig

    config = griffin_config()
    mixers = dataclasses.replace(config.mixers, attention=AttentionConfig(heads=4, kv_heads=4, head_dim=8))
    (line,) = differences(dataclasses.replace(config, layers=("rglru", "attention"), mixers=mixers))
    assert line == "model.layers: attention; RecurrentGemma needs layers of rglru and local_attention alone"
