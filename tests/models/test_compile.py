"""A language model of each mixer, compiled to one graph and recomputed in the backward pass, is the same model."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.config import ModelConfig
from models.lm import LM
from models.mixers import MIXERS, MixerConfigs
from models.mlp import MLPConfig
from tests.models.test_mixers import EXAMPLES, WIDTH

VOCABULARY, LENGTH = 50, 37


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(kind: str) -> LM:
    """Two blocks of a kind whose layers share something, else one."""
    layers = (kind,) * (2 if hasattr(MIXERS[kind], "shared_module") else 1)
    lm = LM(
        ModelConfig(
            vocab_size=VOCABULARY,
            width=WIDTH,
            layers=layers,
            mixers=MixerConfigs(**{kind: EXAMPLES[kind]}),
            mlp=MLPConfig(width=40),
        )
    )
    return lm.double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of documents, one of a single token."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, VOCABULARY, (2, 2, LENGTH), generator=generator)
    rows = [(20, 1, 16), (37,)]
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]), labels


def loss_and_gradients(lm: LM, run: Any) -> list[Tensor]:
    nll, log_z = run(*batch())
    loss = nll.mean() + 1e-2 * log_z.square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(lm.parameters()))]


@pytest.mark.parametrize("kind", MIXERS)
def test_compiled_to_one_graph(kind: str) -> None:
    lm = model(kind)
    expected = loss_and_gradients(lm, lm)
    compiled = torch.compile(lm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradients(lm, compiled), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MIXERS)
def test_checkpointed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block recomputed, as activation checkpointing does."""
    lm = model(kind)
    expected = loss_and_gradients(lm, lm)
    for block in lm.blocks:
        inner = block.forward
        monkeypatch.setattr(block, "forward", lambda *z, f=inner: checkpoint(f, *z, use_reentrant=False))
    torch.testing.assert_close(loss_and_gradients(lm, lm), expected, rtol=0, atol=0)
