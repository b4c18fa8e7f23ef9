"""Compiled blocks: the same losses and gradients, as many graphs for few blocks as for many, beside other axes."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from models.lm import LM
from parallel import compiled
from parallel.compiled import compile_blocks
from parallel.config import ParallelConfig
from parallel.grid import Grid
from tests.parallel.engines import Curve, Split, engine_of, take
from tests.parallel.mixed import TIME, config_of, loss_of

SOME = ("hgrn2", "rglru", "hgrn2")
"""HGRN2's second layer asks for its lower bound, the first has none."""
EVERY = (*SOME, "gated_deltanet", "paralstm", "local_attention", "attention")


@pytest.fixture(autouse=True)
def own_compiler() -> Iterator[None]:
    """What is compiled and set here is nobody else's."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch.compiler.reset()


class Counting:
    """A backend without a compiler."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_eager(module, inputs)


def pass_of(model: LM, rows: int) -> list[torch.Tensor]:
    """Loss and gradients of rows with documents of their own."""
    tokens = torch.randint(0, 61, (2, TIME), generator=torch.Generator().manual_seed(rows))
    positions = torch.cat([torch.arange(rows), torch.arange(TIME - rows)]).expand(2, -1).contiguous()
    loss = loss_of(*model(tokens, positions, tokens))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def graphs(layers: tuple[str, ...]) -> int:
    torch.compiler.reset()
    backend = Counting()
    model = LM(config_of(layers)).double()
    plain = copy.deepcopy(model)
    with mock.patch.object(compiled, "BACKEND", backend):
        compile_blocks(model, "cpu")
    for rows in (5, 11):
        torch.testing.assert_close(pass_of(model, rows), pass_of(plain, rows), rtol=1e-9, atol=1e-12)
        if rows == 5:
            first = backend.graphs
    assert backend.graphs == first > 0, "other documents are no other graphs"
    with torch.no_grad():
        tokens = torch.zeros(1, TIME + 1, dtype=torch.int64)
        model(tokens, torch.arange(TIME + 1)[None], tokens)
    assert backend.graphs == first, "what needs no gradients is not compiled"
    return first


def test_losses_and_gradients_are_the_same_and_blocks_of_a_kind_share_graphs() -> None:
    assert graphs(SOME) == graphs((*SOME, "hgrn2", "rglru", "hgrn2", "hgrn2"))


@pytest.mark.slow
def test_every_mixer_can_be_compiled() -> None:
    graphs(EVERY)


def curves(grid: Grid, split: Split, backend: Any, **parallel: Any) -> list[Curve]:
    torch.compiler.reset()
    with mock.patch.object(compiled, "BACKEND", backend):
        return [
            take(engine_of(grid, split, config_of(SOME), parallel={"compile": choice, **parallel}), range(3))
            for choice in (False, True)
        ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "parallel"),
    [
        (Split(2), {"activation_checkpointing": "full"}),
        (Split(sequence=2), {}),
        (Split(zero=2), {"activation_checkpointing": "full"}),
    ],
    ids=str,
)
def test_beside_stages_slices_and_checkpointing(ranks: Any, split: Split, parallel: dict[str, Any]) -> None:
    for plain, found in ranks(2).run(curves, split=split, backend="aot_eager", **parallel):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=0.0)


@pytest.mark.slow
def test_with_torchs_own_compiler(ranks: Any) -> None:
    plain, found = ranks(1).run(curves, split=Split(), backend="inductor", timeout=600.0)[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=0.0)


def test_it_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ({"tensor": 2}, {"zero_stage": 3}):
        with pytest.raises(
            ValueError, match=r"compile: true; needs tensor: 1 and a zero_stage below 3, .* leave it out"
        ):
            ParallelConfig(compile=True, **other)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        ValueError, match=r"parallel\.compile: true; on cpu torch.compile needs one of g\+\+, .*none is"
    ):
        compile_blocks(LM(config_of(SOME)), "cpu")
