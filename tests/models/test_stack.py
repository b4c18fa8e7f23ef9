"""Every mixer beside every other: one stack of all of them in mixed order, local and full attention between."""

import itertools

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.lm import LM
from models.mixers import MIXERS, MixerConfigs
from models.mlp import MLPConfig
from tests.models.test_mixers import EXAMPLES, WIDTH

FIRST, *OTHERS = MIXERS
ORDERS = {  # each mixer before and after others; HGRN2 twice: its first layer has no bound
    "one way": (*OTHERS, FIRST, "hgrn2"),
    "the other way": ("hgrn2", FIRST, *reversed(OTHERS)),
}
VOCABULARY, LENGTH = 50, 37
DOCUMENTS = [(1, 7, 12, 1, 16), (20, 1, 16), (37,)]


def config(layers: tuple[str, ...]) -> ModelConfig:
    """Attention blocks post-norm, so that both kinds of block stand side by side."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        width=WIDTH,
        layers=layers,
        mixers=MixerConfigs(**EXAMPLES),
        mlp=MLPConfig(width=40),
        post_norm=("attention",),
    )


def model(order: str) -> LM:
    """Weights far from their initial values: every bias, bound and tap counts."""
    lm = LM(config(ORDERS[order]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lm.double()


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (len(DOCUMENTS), LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])


def test_both_attentions_stand_between_recurrences() -> None:
    layers = ORDERS["one way"]
    assert set(layers) == MIXERS.keys()
    for kind in ("attention", "local_attention"):
        place = layers.index(kind)
        assert not any("attention" in beside for beside in (layers[place - 1], layers[place + 1]))


@pytest.mark.parametrize("order", ORDERS)
def test_packed_documents_equal_separate_ones(order: str) -> None:
    """Logits and the gradient of every parameter."""
    ids, positions = batch()
    weight = torch.randn(*ids.shape, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for packed in (True, False):
        lm = model(order)
        if packed:
            logits, _ = lm(ids, positions)
        else:
            rows = [torch.cat([alone(lm, part) for part in row.split(sizes)]) for row, sizes in zip(ids, DOCUMENTS)]
            logits = torch.stack(rows)
        (logits * weight).sum().backward()
        results.append([logits.detach(), *(p.grad for p in lm.parameters())])
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-8, atol=1e-9)


def alone(lm: LM, document: Tensor) -> Tensor:
    return lm(document[None], torch.arange(len(document))[None])[0][0]


@pytest.mark.parametrize("order", ORDERS)
def test_prefill_and_steps_equal_the_whole(order: str) -> None:
    ids, positions = batch()
    lm = model(order).requires_grad_(False)
    whole, _ = lm(ids, positions)
    state, pieces = lm.init_state(len(ids)), []
    borders = [0, 15, *range(16, LENGTH + 1)]
    for start, end in itertools.pairwise(borders):
        logits, state = lm(ids[:, start:end], positions[:, start:end].contiguous(), state=state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_trains_every_parameter(order: str) -> None:
    lm = LM(config(ORDERS[order]))
    assert lm.num_params() == lm.config.num_params()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
    ids, positions = batch()
    losses = []
    for _ in range(2):
        nll, _ = lm(ids, positions, ids.roll(-1, dims=1))
        nll.mean().backward()
        for name, parameter in lm.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nll.mean().item())
    assert losses[1] < losses[0]
