"""FLOPs by formula against counts of what is computed, exactly, token by token through the state.

In single steps of the reference tier nothing is computed that the formula leaves out: an attention step multiplies with
the keys it sees and no others. `FlopCounterMode` counts the matrix products, all of them outside the recurrences and
convolutions, which multiply element by element: those multiplications are counted by `Multiplications`, each with its
addition as two FLOPs. Not in any formula: norms, activations, gates, rotations, and `VECTORS`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.config import ModelConfig
from models.init import initialize
from models.lm import LM
from models.mixers import MIXERS, MixerConfigs
from models.mixers.placement import OpCore
from models.mlp import MLPConfig
from ops import Layout, attention, local_attention
from tests.models.test_mixers import EXAMPLES, WIDTH, placement

LENGTH = 8  # mean keys seen, times the FLOPs of one, is whole
VECTORS = {  # multiplications a token, of vectors and not of states: scaling of queries; of outputs and by beta
    "hgrn2": 32,
    "gated_deltanet": 2 * 48,
}
SINGLE_KEYS = {"attention": 32, "local_attention": 32}
"""Multiplications of values by weights where a query sees one key: einsum takes no matrix product for them."""


class Multiplications(TorchDispatchMode):
    """Counts the results of element-by-element multiplications."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.mul:
            self.count += result.numel()
        assert "addcmul" not in str(function), "a product that would not be counted"
        return result


class Counted(nn.Module):
    """A core whose multiplications are counted, attention's excepted: its products are matrix products."""

    def __init__(self, core: OpCore, tally: Multiplications) -> None:
        super().__init__()
        core.impl = "reference"
        self.core, self.tally, self.impl = core, tally, core.impl

    def forward(self, *tensors: Tensor | None, **settings: Any) -> Any:
        if self.core.op in (attention, local_attention):
            return self.core(*tensors, **settings)
        with self.tally:
            return self.core(*tensors, **settings)


@contextmanager
def counting(model: nn.Module) -> Iterator[tuple[FlopCounterMode, Multiplications]]:
    tally = Multiplications()
    for module in list(model.modules()):
        if isinstance(getattr(module, "core", None), OpCore):
            module.core = Counted(module.core, tally)  # type: ignore[arg-type]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        yield counter, tally


SWITCHED_OFF = {
    "gated_deltanet": {"output_gate": False, "conv_width": None},
    "hgrn2": {"conv_width": None, "conv_bias": False},
    "paralstm": {"output_gate": False},
}


@pytest.mark.parametrize(
    ("kind", "switches"), [*((kind, {}) for kind in MIXERS), *SWITCHED_OFF.items()], ids=lambda value: str(value or "")
)
def test_mixer(kind: str, switches: dict[str, Any]) -> None:
    mixer = MIXERS[kind](replace(EXAMPLES[kind], **switches), placement(kind))
    initialize(mixer, seed=0)
    x, state = torch.randn(1, LENGTH, WIDTH), mixer.init_state(1, "cpu")
    with counting(mixer) as (counter, tally):
        for t in range(LENGTH):
            _, state = mixer(x[:, t : t + 1], Layout(torch.tensor([[t]])), state)
    products = counter.get_total_flops() + 2 * SINGLE_KEYS.get(kind, 0)
    assert products > 0
    assert products + 2 * (tally.count - LENGTH * VECTORS.get(kind, 0)) == LENGTH * mixer.flops_per_token(LENGTH)
    assert (tally.count == 0) == ("attention" in kind)


def test_model() -> None:
    """All mixers in one stack, MLPs and head; the head's chunked loss is the same product."""
    config = ModelConfig(
        vocab_size=50,
        width=WIDTH,
        layers=tuple(MIXERS),
        mixers=MixerConfigs(**EXAMPLES),
        mlp=MLPConfig(width=40),
    )
    model = LM(config)
    ids, state = torch.randint(0, 50, (1, LENGTH)), model.init_state(1)
    expected = LENGTH * model.flops_per_token(LENGTH)
    with counting(model) as (counter, tally):
        for t in range(LENGTH):
            _, state = model(ids[:, t : t + 1], torch.tensor([[t]]), state=state)
    products = counter.get_total_flops() + 2 * sum(SINGLE_KEYS.values())
    assert products + 2 * (tally.count - LENGTH * sum(VECTORS.values())) == expected
