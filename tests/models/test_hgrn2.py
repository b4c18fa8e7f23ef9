"""HGRN2: its decays and their bounds, and the whole model against flash-linear-attention's."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.hgrn2 import HGRN2, HGRN2Config, LowerBounds
from models.mixers.placement import Placement
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig
from ops import Layout
from training.optimizer import parameter_groups

TOLERANCE = 1e-4
ROWS, LENGTH, WIDTH, VOCABULARY = 2, 70, 32, 61
DOCUMENTS = ((1, 30, 39), (70,), (32, 32, 6))


def config(layers: tuple[str, ...] = ("hgrn2",) * 3, **mixer: Any) -> ModelConfig:
    """Without what flash-linear-attention's model lacks."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        width=WIDTH,
        layers=layers,
        mixers=MixerConfigs(
            hgrn2=HGRN2Config(**({"expand_ratio": 8} | mixer)), rglru=RGLRUConfig(width=32, gate_blocks=4)
        ),
        mlp=MLPConfig(width=44, activation="silu", bias=False),
        norm_one_plus_weight=False,
        tie_embeddings=False,
        scale_embeddings=False,
        logit_soft_cap=None,
    )


def model(settings: ModelConfig | None = None) -> LM:
    """Weights far from their initial values: no norm is one, no bound where it starts, every conv tap counts."""
    lm = LM(settings or config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            std = 1.0 if name in ("embed.weight", "shared.hgrn2.lower_bounds") else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return lm


def bounds(count: int = 4, channels: int = 6) -> LowerBounds:
    module = LowerBounds(count, channels, heads=1).double()
    with torch.no_grad():
        module.lower_bounds.normal_(generator=torch.Generator().manual_seed(0))
    return module


def test_bounds_are_sums_of_shares_over_depth() -> None:
    module = bounds()
    shares = module.lower_bounds.softmax(0)
    for index in (1, 2, 3):
        log_bound, log_rest = module(index)
        torch.testing.assert_close(log_bound.exp(), shares.cumsum(0)[index] - shares[0])
        torch.testing.assert_close(log_bound.exp() + log_rest.exp(), torch.ones(6, dtype=torch.float64))


def test_bounds_start_evenly_spaced() -> None:
    shared = LM(config(layers=("hgrn2",) * 4)).shared["hgrn2"]
    for index in (1, 2, 3):
        torch.testing.assert_close(shared(index)[0].exp(), torch.full((32,), index / 4))


@pytest.mark.parametrize("index", [0, 1, 3])
def test_decays_and_keys(index: int) -> None:
    """decay = bound + (1 - bound) sigmoid(f), key = 1 - decay; precise where decays are close to 0 or 1, too."""
    shared = bounds(channels=8)
    mixer = HGRN2(HGRN2Config(heads=2), Placement(width=8, index=index, count=4, shared=shared.float()))
    f = torch.linspace(-30, 30, 400).view(1, 50, 8)
    k, log_decay = mixer.gated(f)
    shares = shared.lower_bounds.double().softmax(0)
    bound = shares[1 : index + 1].sum(0)
    torch.testing.assert_close(k.double(), (1 - bound) * torch.sigmoid(-f.double()), rtol=1e-6, atol=0)
    decay = bound + (1 - bound) * torch.sigmoid(f.double())
    torch.testing.assert_close(log_decay.exp().double(), decay, rtol=3e-6, atol=0)
    assert (log_decay <= 0).all()


def test_bounds_rise_by_the_number_among_their_kind() -> None:
    """Other mixers between two of the kind do not count."""
    lm = model(config(layers=("hgrn2", "rglru", "hgrn2", "rglru", "hgrn2")))
    assert [lm.blocks[i].mixer.index for i in (0, 2, 4)] == [0, 1, 2]
    assert lm.shared["hgrn2"].lower_bounds.shape == (3, 32)
    f = torch.full((1, 1, 32), -60.0)  # a closed gate leaves the bound alone
    for i, index in ((2, 1), (4, 2)):
        torch.testing.assert_close(lm.blocks[i].mixer.gated(f)[1][0, 0], lm.shared["hgrn2"](index)[0])


def test_shared_bounds_belong_to_the_model_once() -> None:
    settings = config()
    lm = model(settings)
    names = [name for name, _ in lm.named_parameters() if "lower_bounds" in name]
    assert names == ["shared.hgrn2.lower_bounds"]
    assert [name for name in lm.state_dict() if "lower_bounds" in name] == names
    assert settings.num_params() == lm.num_params()
    table = {row["layer"]: row["parameters"] for row in lm.layer_table(16)}
    assert sum(table.values()) == lm.num_params()
    assert table["shared.hgrn2"] == 3 * 32
    assert table["head"] == lm.head.weight.numel() + WIDTH
    assert any(lm.shared["hgrn2"].lower_bounds is p for p in parameter_groups(lm, 0.1)[1]["params"])


@pytest.mark.parametrize("changes", [{"lower_bound": False}, {"layers": ("hgrn2",)}], ids=str)
def test_without_bounds(changes: dict) -> None:
    """Switched off, or with one layer, whose bound is 0, there is nothing to learn: no parameter exists."""
    settings = config(**changes)
    lm = model(settings)
    assert not [name for name, _ in lm.named_parameters() if "shared" in name]
    assert settings.num_params() == lm.num_params()
    ids, positions = batch(DOCUMENTS[0])
    lm(ids, positions, ids)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lm.parameters())
    f = torch.randn(1, 3, 32)
    assert torch.equal(lm.blocks[-1].mixer.gated(f)[1], F.logsigmoid(f))


def test_state_through_the_whole_model() -> None:
    lm = model(config(conv_width=3)).double()
    ids, positions = batch(DOCUMENTS[0])
    whole, _ = lm(ids, positions)
    state, pieces = lm.init_state(ROWS), []
    for start, end in ((0, 5), (5, 6), (6, LENGTH)):
        logits, state = lm(ids[:, start:end], positions[:, start:end].contiguous(), state=state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"heads": 4}, (4, 8, 8)),
        ({"expand_ratio": 16}, (2, 16, 16)),
        ({"heads": 4, "expand_ratio": 16}, (4, 16, 8)),
    ],
)
def test_head_shapes(settings: dict, shape: tuple[int, int, int]) -> None:
    assert HGRN2Config(**settings).head_shape(WIDTH) == shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "heads, expand_ratio: both null; give one"),
        ({"heads": 0}, "heads: 0; must be at least 1"),
        ({"heads": 5}, r"heads: 5; must divide the model's width \(32\): choose e.g. 4"),
        ({"expand_ratio": 12}, r"expand_ratio: 12; must divide the model's width \(32\): choose e.g. 8"),
        ({"heads": 4, "conv_width": 0}, "conv_width: 0; must be at least 1"),
        ({"heads": 4, "conv_bias": True}, "conv_bias: true without a convolution"),
        ({"heads": 4, "norm_eps": 0.0}, "norm_eps: 0.0; must be positive"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HGRN2(HGRN2Config(**settings), Placement(width=WIDTH))


def batch(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(n) for n in lengths]).repeat(ROWS, 1)


HF_NAMES = {
    "embed.weight": "model.embeddings.weight",
    "shared.hgrn2.lower_bounds": "model.lower_bounds",
    "head.norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
HF_PARTS = {"mixer_norm": "attn_norm", "mixer.norm": "attn.g_norm", "mixer": "attn", "gate": "gate_proj"}
HF_PARTS |= {"up": "up_proj", "down": "down_proj", "q_conv": "q_conv1d", "f_conv": "f_conv1d", "i_conv": "i_conv1d"}


def hf_name(name: str) -> str:
    """The name in flash-linear-attention's model of the parameter that `LM` calls `name`."""
    if name in HF_NAMES:
        return HF_NAMES[name]
    for ours, theirs in HF_PARTS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace("blocks.", "model.layers.")


@pytest.fixture(scope="module")
def hgrn2_class() -> Iterator[Any]:
    """HGRN2ForCausalLM with its GPU kernels replaced by the library's own naive op and by plain torch."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", message="Triton is not supported")
        import fla.layers.hgrn2
        import fla.modules.mlp
        from fla.models import HGRN2ForCausalLM
        from fla.ops.gla.naive import naive_recurrent_gla

        def naive(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            decay = options["g"] if "g" in options else options["gk"]
            assert options["initial_state"] is None
            assert options["cu_seqlens"] is None
            return naive_recurrent_gla(q, k, v, decay)

        def norm_linear(x: Tensor, weight: Tensor, _: None, linear: Tensor, bias: None, eps: float = 1e-5) -> Tensor:
            return F.linear(F.rms_norm(x, x.shape[-1:], weight, eps), linear, bias)

        def conv(self: nn.Conv1d, x: Tensor, **_: Any) -> tuple[Tensor, None]:
            padded = F.pad(x.mT, (self.kernel_size[0] - 1, 0))
            return F.conv1d(padded, self.weight, self.bias, groups=x.shape[-1]).mT, None

        for name, plain in {
            "chunk_gla": naive,
            "fused_recurrent_gla": naive,
            "rms_norm_linear": norm_linear,
            "swish": F.silu,
        }.items():
            patch.setattr(fla.layers.hgrn2, name, plain)
        patch.setattr(fla.layers.hgrn2.ShortConvolution, "forward", conv)
        patch.setattr(fla.modules.mlp, "swiglu", lambda gate, y: F.silu(gate) * y)
        yield HGRN2ForCausalLM


def theirs_of(lm: LM, hgrn2_class: Any) -> nn.Module:
    mixer = lm.config.mixers.hgrn2
    twin = hgrn2_class(
        hgrn2_class.config_class(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=len(lm.config.layers),
            expand_ratio=mixer.expand_ratio,
            use_lower_bound=mixer.lower_bound,
            use_short_conv=mixer.conv_width is not None,
            conv_size=mixer.conv_width,
            intermediate_size=lm.config.mlp.width,
            norm_eps=lm.config.norm_eps,
            fuse_norm=False,
            fuse_swiglu=False,
            fuse_cross_entropy=False,
            use_cache=False,
        )
    )
    weights = {hf_name(name): p.detach() for name, p in lm.named_parameters()}
    twin.load_state_dict({name: w.unsqueeze(1) if "conv1d" in name else w for name, w in weights.items()})
    return twin


def close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().item()
    assert scale > 0, f"{what} is zero everywhere: nothing is compared"
    assert (found - expected).abs().max().item() <= TOLERANCE * scale, what


@pytest.mark.parametrize("settings", [{}, {"lower_bound": False}, {"conv_width": 4}], ids=str)
@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_whole_model(hgrn2_class: Any, lengths: tuple[int, ...], settings: dict[str, Any]) -> None:
    """Logits and the gradient of every parameter: ours packed, theirs one document at a time."""
    lm = model(config(**settings))
    twin = theirs_of(lm, hgrn2_class)
    ids, positions = batch(lengths)
    weight = torch.randn(ROWS, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits, _ = lm(ids, positions)
    expected = torch.cat([twin(piece).logits for piece in ids.split(lengths, dim=1)], dim=1)
    close(logits, expected, "logits")
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in lm.named_parameters():
        close(parameter.grad, theirs.pop(hf_name(name)).grad.view(parameter.shape), name)
    assert not theirs


def test_a_shifted_bound_is_caught(hgrn2_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above: each layer with the bound of the one before it."""
    forward = LowerBounds.forward
    monkeypatch.setattr(LowerBounds, "forward", lambda self, index: forward(self, index - 1 or 1))
    with pytest.raises(AssertionError, match="logits"):
        test_whole_model(hgrn2_class, DOCUMENTS[1], {})


def test_a_dropped_reset_is_caught(hgrn2_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "starts", property(lambda self: torch.zeros_like(self.positions, dtype=torch.bool)))
    with pytest.raises(AssertionError, match="logits"):
        test_whole_model(hgrn2_class, DOCUMENTS[0], {})
