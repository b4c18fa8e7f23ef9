"""The contract that every mixer of the registry keeps; a new mixer needs one entry in EXAMPLES."""

from typing import Any

import pytest
import torch

from models.init import initialize
from models.mixers import MIXERS
from models.mixers.attention import AttentionConfig, LocalAttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from models.mixers.hgrn2 import HGRN2Config
from models.mixers.paralstm import ParaLSTMConfig
from models.mixers.placement import Placement
from models.mixers.rglru import RGLRUConfig
from ops import Layout

WIDTH = 24
EXAMPLES = {
    "attention": AttentionConfig(heads=4, kv_heads=2, head_dim=8, qkv_bias=True, qk_norm="full"),
    "gated_deltanet": GatedDeltaNetConfig(
        heads=2, value_heads=4, head_dim=8, expand_v=1.5, conv_width=3, negative_eigenvalues=True
    ),
    "hgrn2": HGRN2Config(heads=4, expand_ratio=8, conv_width=3, conv_bias=True),
    "local_attention": LocalAttentionConfig(
        heads=4, kv_heads=1, head_dim=8, window=5, rotary_fraction=0.5, output_bias=True, qk_norm="head"
    ),
    "paralstm": ParaLSTMConfig(width=32, heads=4, weight_limit=0.3, forget_bias=(0.0, 2.0)),
    "rglru": RGLRUConfig(width=32, gate_blocks=4),
}
DOCUMENTS = [(1, 7, 12, 1, 16), (20, 1, 16), (37,)]  # lengths a row; one token, row-long, borders anywhere


def placement(kind: str) -> Placement:
    """In the third of four layers of the kind, with what these share."""
    if not hasattr(MIXERS[kind], "shared_module"):
        return Placement(width=WIDTH)
    shared = MIXERS[kind].shared_module(EXAMPLES[kind], WIDTH, 4)
    assert EXAMPLES[kind].num_shared_params(WIDTH, 4) == sum(p.numel() for p in shared.parameters())
    initialize(shared, seed=4)
    return Placement(width=WIDTH, index=2, count=4, shared=shared)


def build(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    mixer = MIXERS[kind](EXAMPLES[kind], placement(kind))
    initialize(mixer, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # every bias and conv tap must matter
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return mixer.to(dtype)


def packed_input(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(len(DOCUMENTS), 37, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return x, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])


def test_every_mixer_is_tried() -> None:
    assert EXAMPLES.keys() == MIXERS.keys()


@pytest.mark.parametrize("kind", MIXERS)
def test_shapes_and_absent_state(kind: str) -> None:
    x, positions = packed_input()
    y, state = build(kind)(x, Layout(positions))
    assert y.shape == x.shape
    assert state is None


@pytest.mark.parametrize("kind", MIXERS)
def test_packed_documents_equal_separate_ones(kind: str) -> None:
    """Outputs, and the gradients of inputs and of every parameter."""
    x, positions = packed_input()
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    results = []
    for packed in (True, False):
        mixer, leaf = build(kind), x.clone().requires_grad_()
        if packed:
            y, _ = mixer(leaf, Layout(positions))
        else:
            y = torch.stack([run_documents(mixer, leaf[i], row) for i, row in enumerate(DOCUMENTS)])
        (y * weight).sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in mixer.parameters())])
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-10)


def run_documents(mixer: Any, row: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    pieces = [mixer(piece[None], Layout(torch.arange(len(piece))[None]))[0][0] for piece in row.split(lengths)]
    return torch.cat(pieces)


@pytest.mark.parametrize("kind", MIXERS)
def test_documents_do_not_see_each_other(kind: str) -> None:
    """The mutant of the test above: without restarting positions the second document changes."""
    x, positions = packed_input()
    mixer = build(kind)
    honest, _ = mixer(x, Layout(positions))
    leaking, _ = mixer(x, Layout(torch.arange(x.shape[1]).expand(len(x), -1)))
    assert (honest[0, 8] - leaking[0, 8]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("sizes", [(37,), (1,) * 37, (7, 1, 29), (20, 17)], ids=["prefill", "steps", "mixed", "halves"])
def test_state_carries_everything(kind: str, sizes: tuple[int, ...]) -> None:
    """Any split of a row, the state carried, gives the outputs and input gradients of the whole row."""
    x, positions = packed_input()
    mixer = build(kind)
    whole_input, split_input = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole, _ = mixer(whole_input, Layout(positions))
    state, pieces = mixer.init_state(len(x), "cpu"), []
    for piece, places in zip(split_input.split(sizes, dim=1), positions.split(sizes, dim=1), strict=True):
        y, state = mixer(piece, Layout(places.contiguous()), state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-10)
    whole.square().sum().backward()
    torch.cat(pieces, dim=1).square().sum().backward()
    torch.testing.assert_close(split_input.grad, whole_input.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", MIXERS)
def test_bf16_autocast_stays_close_and_finite(kind: str) -> None:
    x, positions = packed_input(torch.float32)
    mixer = build(kind, torch.float32)
    exact, _ = mixer(x, Layout(positions))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mixer(x, Layout(positions))
    y.float().square().sum().backward()
    assert torch.isfinite(y).all()
    assert (y.float() - exact).norm() / exact.norm() < 2e-2
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if "attention" not in kind])
def test_recurrent_state_is_fp32_under_autocast(kind: str) -> None:
    x, positions = packed_input(torch.float32)
    mixer = build(kind, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = mixer(x, Layout(positions), mixer.init_state(len(x), "cpu"))
    assert {leaf.dtype for leaf in torch.utils._pytree.tree_leaves(state)} == {torch.float32}


@pytest.mark.parametrize("kind", MIXERS)
def test_parameters_follow_their_formula(kind: str) -> None:
    """FLOPs: `tests/models/test_flops.py`."""
    assert EXAMPLES[kind].num_params(WIDTH) == sum(p.numel() for p in build(kind).parameters())


@pytest.mark.parametrize("kind", MIXERS)
def test_initial_weights_depend_on_seed_and_name_alone(kind: str) -> None:
    first, again, other = (MIXERS[kind](EXAMPLES[kind], placement(kind)) for _ in range(3))
    torch.manual_seed(5)
    initialize(first, seed=1)
    torch.manual_seed(6)
    initialize(again, seed=1)
    initialize(other, seed=2)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        constant = "bias" in name or "norm" in name or "scale" in name
        assert constant or not torch.equal(parameter, other.get_parameter(name)), name
