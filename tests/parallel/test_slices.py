"""Slices of rows: three and four of them, states handed on, weights under which states settle slowly or not at all."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from models.mixers.placement import OpCore
from ops import Layout, diagonal_gru, diagonal_lstm
from ops.summary import AFFINE_SUMMARIES, CELL_SUMMARIES
from parallel import sequence
from parallel.collectives import all_gather
from parallel.grid import Grid
from tests.parallel.mixed import alone, config_of, together
from tests.parallel.test_partition import assert_equal

RECURRENT = ("rglru", "hgrn2", "gated_deltanet", "paralstm")
THREE: dict[str, Any] = {"layers": (*RECURRENT, "local_attention")}
OTHER_NORMS: dict[str, Any] = {
    "layers": ("attention", "gated_deltanet"),
    "tied": False,
    "changes": {
        "attention": {"qk_norm": "full", "kv_heads": 4, "qkv_bias": True},
        "gated_deltanet": {"conv_width": None, "output_gate": False},
        "model": {
            "norm_one_plus_weight": False,
            "post_norm": ("attention",),
            "logit_soft_cap": None,
            "scale_embeddings": False,
            "vocab_size": 62,
        },
    },
}


def stack(grid: Grid, split: tuple[int, int], settings: dict[str, Any]) -> dict[str, Tensor]:
    return together(grid, *split, settings)[0]


@pytest.mark.parametrize(
    ("size", "split", "settings"), [(3, (3, 1), THREE), (2, (1, 2), OTHER_NORMS), (2, (2, 1), OTHER_NORMS)]
)
def test_gradients_equal_one_process(ranks: Any, size: int, split: tuple[int, int], settings: dict[str, Any]) -> None:
    wanted = alone(config_of(**settings))
    for found in ranks(size).run(stack, split=split, settings=settings):
        assert_equal(found, wanted)


def by_hand(grid: Grid) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The recurrences as if none had a summary; what was sent along the sequence axis by operation, in calls."""
    with mock.patch.dict(AFFINE_SUMMARIES, clear=True), mock.patch.dict(CELL_SUMMARIES, clear=True):
        found, volumes = together(grid, grid.world_size, 1, {"layers": RECURRENT})
    calls: dict[str, int] = {}
    for key, volume in volumes.items():
        calls[key.operation] = calls.get(key.operation, 0) + volume.calls
    return found, calls


@pytest.mark.parametrize("size", [2, 3])
def test_a_recurrence_without_summary_hands_its_state_on(ranks: Any, size: int) -> None:
    wanted = alone(config_of(RECURRENT))
    for rank, (found, calls) in enumerate(ranks(size).run(by_hand)):
        assert_equal(found, wanted)
        neighbours, rows, convolutions = (rank > 0) + (rank < size - 1), 2, 6
        assert calls == {"send": neighbours * (rows * len(RECURRENT) + convolutions)}, "row by row"


TIME, DIM = 24, 16
CELLS = {"diagonal_lstm": (diagonal_lstm, 2), "diagonal_gru": (diagonal_gru, 0)}
Case = tuple[str, float, bool]
"""The cell, the standard deviation of its weights, and whether no state counts as settled."""


def cell_inputs(name: str, std: float) -> tuple[list[Tensor], Layout, Tensor]:
    """gates, a and for the LSTM c; a layout; the weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(0)
    peepholes = [(CELLS[name][1], DIM)] if CELLS[name][1] else []
    shapes = [(2, TIME, 3, DIM), (3, DIM), *peepholes]
    gates, *rest = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    positions = torch.arange(TIME).repeat(2, 1)
    positions[0, 9:] = torch.arange(TIME - 9)
    tensors = [gates, *(std * z for z in rest)]
    return [z.requires_grad_() for z in tensors], Layout(positions), torch.randn(2, TIME, DIM, generator=generator)


def cells(grid: Grid, cases: list[Case]) -> list[tuple[list[Tensor], bool]]:
    """Outputs, and gradients of gates and weights, whole; and whether states were handed on."""
    axis = grid.arranged(sequence=grid.world_size).axes["sequence"]
    here = slice(axis.index * TIME // axis.size, (axis.index + 1) * TIME // axis.size)
    found = []
    for name, std, unsettled in cases:
        tensors, layout, weight = cell_inputs(name, std)
        core = OpCore(CELLS[name][0], "chunked", {})
        gates, *rest = tensors
        slices = (gates[:, here], *rest)
        with (
            mock.patch.dict(sequence.TOLERANCE, {torch.float64: -1.0} if unsettled else {}),
            mock.patch.object(sequence, "hand_off", wraps=sequence.hand_off) as hand_off,
        ):
            y = sequence.run(core, axis, slices, Layout(layout.positions[:, here]))
        (y * weight[:, here]).sum().backward()
        whole = torch.cat(all_gather(y, axis).unbind(0), dim=1)
        found.append(([whole, *(all_gather(z.grad, axis).sum(0) for z in tensors)], hand_off.called))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_nonlinear_recurrences_of_large_weights_equal_one_process(ranks: Any, size: int) -> None:
    cases: list[Case] = [(name, std, False) for name in CELLS for std in (0.5, 2.0, 8.0)]
    cases += [(name, 2.0, True) for name in CELLS]
    of_ranks = ranks(size).run(cells, cases=cases)
    for i, (name, std, unsettled) in enumerate(cases):
        tensors, layout, weight = cell_inputs(name, std)
        y = CELLS[name][0](*tensors, layout=layout)[0]
        (y * weight).sum().backward()
        for found, handed_on in (of_rank[i] for of_rank in of_ranks):
            for one, wanted in zip(found, [y.detach(), *(z.grad for z in tensors)], strict=True):
                assert float((one - wanted).norm() / wanted.norm()) <= 1e-9, (name, std)
            assert handed_on == of_ranks[0][i][1], "all ranks agree"
            if std <= 0.5 or size == 2:
                assert not handed_on, "two slices need one correction, small weights settle"
            if unsettled and size > 2:
                assert handed_on
