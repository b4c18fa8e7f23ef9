"""Pipeline stages without processes: the balance against every division there is, and what each stage holds."""

import itertools
import random
from typing import Any

import pytest
import torch

from models.lm import LM
from parallel.stages import Held, Stages, balance, bubble, describe, keep_stage, stages_of
from tests.parallel.mixed import EVERY_MIXER, TIME, config_of


def divisions(count: int, size: int) -> list[tuple[int, ...]]:
    """All ways to divide so many blocks into `size` runs."""
    return [
        tuple(after - first for first, after in itertools.pairwise((0, *middle, count)))
        for middle in itertools.combinations(range(1, count), size - 1)
    ]


def loads(lengths: tuple[int, ...], costs: list[int], head: int) -> list[int]:
    """Of each stage."""
    bounds = list(itertools.accumulate(lengths, initial=0))
    found = [sum(costs[first:after]) for first, after in itertools.pairwise(bounds)]
    return [*found[:-1], found[-1] + head]


@pytest.mark.parametrize("seed", range(40))
def test_no_division_has_a_cheaper_dearest_stage(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.randint(1, 9) for _ in range(draw.randint(1, 9))]
    head = draw.choice([0, 3, 30])
    for size in range(1, len(costs) + 1):
        found = balance(costs, head, size)
        every = divisions(len(costs), size)
        assert found in every
        best = min(max(loads(lengths, costs, head)) for lengths in every)
        assert max(loads(found, costs, head)) == best
        squares = {
            lengths: sum(load**2 for load in loads(lengths, costs, head))
            for lengths in every
            if max(loads(lengths, costs, head)) == best
        }
        assert squares[found] == min(squares.values()), "the most even of the best"


def test_the_head_counts_and_no_stage_is_without_a_block() -> None:
    assert balance([1] * 8, 0, 4) == (2, 2, 2, 2)
    assert balance([1] * 8, 2, 2) == (5, 3)
    assert balance([1] * 4, 1000, 4) == (1, 1, 1, 1)
    assert balance([5], 1, 1) == (1,)


def blank(layers: tuple[str, ...] = EVERY_MIXER, **settings: Any) -> LM:
    with torch.device("meta"):
        return LM(config_of(layers, **settings))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stages_together_hold_the_model_under_its_names(tied: bool, size: int) -> None:
    whole = blank(tied=tied)
    names = {name: parameter.shape for name, parameter in whole.named_parameters()}
    stages = stages_of(whole, TIME, size)
    assert stages.bounds[0] == 0
    assert stages.bounds[-1] == len(whole.blocks)
    owned = []
    for index in range(size):
        model = blank(tied=tied)
        keep_stage(model, stages, index)
        held = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert held.keys() == stages.names[index]
        assert held.items() <= names.items()
        owned += [name for name in held if name not in stages.owned_before(index)]
        assert any(name.startswith("blocks.") for name in held), "never an embedding alone"
        if index > 0:
            assert ("embed.weight" in held) == (tied and index == size - 1)
        if size > 1 and index == size - 1 and tied:
            assert isinstance(model.embed, Held)
            assert model.head.weight is model.embed.weight
    assert sorted(owned) == sorted(names), "each is saved once"


def test_lower_bounds_are_held_where_a_block_reads_them() -> None:
    model = blank(("hgrn2", "rglru", "hgrn2", "rglru", "hgrn2"), tied=False)
    stages = stages_of(model, TIME, 5)
    assert stages.shared == {"shared.hgrn2.lower_bounds": (2, 4)}, "the first layer of the kind has none"
    assert stages.owned_before(2) == frozenset()
    assert stages.owned_before(4) == {"shared.hgrn2.lower_bounds"}
    assert stages_of(blank(("hgrn2", "rglru")), TIME, 2).shared == {"embed.weight": (0, 1)}, "nothing to bound"


def test_explicit_stages() -> None:
    assert stages_of(blank(), TIME, 3, (4, 1, 2)).bounds == (0, 4, 5, 7)
    with pytest.raises(ValueError, match=r"parallel.stages: \[4, 4\]; these are 8 blocks, but model.layers has 7; cho"):
        stages_of(blank(), TIME, 2, (4, 4))
    with pytest.raises(ValueError, match=r"parallel.pipeline: 8; must be at most the 7 blocks .* choose among 1 to 7"):
        stages_of(blank(), TIME, 8)


def test_what_waiting_costs_stands_in_the_log() -> None:
    assert bubble(1, 1) == 0.0
    assert bubble(6, 3) == 0.25
    stages = Stages((0, 4, 5, 7), (frozenset(),) * 3)
    assert (
        describe(stages, 6)
        == "pipeline: blocks 0 to 3, 4 to 4, 5 to 6; of a step of 6 microbatches each stage waits 25%"
    )
    assert "warning: fewer microbatches than the 3 stages" in describe(stages, 2)
