"""What the planner says ranks send, against the counter: equal to the byte, with activation checkpointing too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import load_config
from models.lm import LM
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.plan.passing import Passing
from parallel.plan.resent import resent
from parallel.stages import stages_of
from parallel.traffic import Key, Volume, counted
from parallel.volume import Split, traffic_of
from tests.parallel.mixed import config_of, loss_of

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS, TIME = 2, 24
LAYERS = ("rglru", "hgrn2", "local_attention", "gated_deltanet", "paralstm", "attention")
SETTINGS: dict[str, Any] = {
    "layers": LAYERS,
    "changes": {"attention": {"qk_norm": "full"}, "local_attention": {"qk_norm": "head"}},
}
Case = tuple[int, int, bool, bool]
"""Sequence ranks, tensor ranks, whether under bf16, whether norms are sharded."""


def measured(grid: Grid, cases: list[Case]) -> list[dict[Key, Volume]]:
    """Of a forward and a backward pass, every block checkpointed."""
    from parallel.partition import build_model

    found = []
    for sequence, tensor, bf16, sharded in cases:
        on = grid.arranged(sequence=sequence, tensor=tensor)
        parallel = ParallelConfig(
            sequence=sequence,
            tensor=tensor,
            sequence_sharded_norms=sharded,
            activation_checkpointing="full",
        )
        model, _, _ = build_model(config_of(**SETTINGS), on, seed=0, sequence_length=TIME, parallel=parallel)
        tokens = torch.randint(0, 61, (ROWS, TIME // sequence), generator=torch.Generator().manual_seed(grid.rank))
        first = on.axes["sequence"].index * TIME // sequence
        positions = torch.arange(first, first + TIME // sequence).expand(ROWS, -1)
        with counted(model) as traffic:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                nll, log_z = model(tokens, positions, tokens)
            loss_of(nll, log_z).backward()
        found.append(traffic.volumes)
    return found


def planned(rank: int, case: Case, found: dict[Key, Volume]) -> dict[Key, Volume]:
    """With as many corrections as the nonlinear recurrence made."""
    sequence, tensor, bf16, sharded = case
    with torch.device("meta"):
        model = LM(config_of(**SETTINGS))
    # Each pass gathers once a correction and once more; the backward pass only scatters.
    gathers = found.get(Key(f"blocks.{LAYERS.index('paralstm')}", "sequence", "all_gather"), Volume(4, 0)).calls
    split = Split(
        rows=ROWS,
        time=TIME,
        sequence=sequence,
        tensor=tensor,
        index=rank // tensor % sequence,
        narrow=2 if bf16 else 4,
        sharded_norms=sharded,
        corrections=gathers // 2 - 1,
    )
    total = traffic_of(model, split)
    for key, volume in resent(model, split, frozenset(range(len(LAYERS)))).items():
        total[key] = total.get(key, Volume(0, 0)).plus(volume)
    return total


TWO: list[Case] = [(2, 1, False, False), (1, 2, True, False), (1, 2, True, True)]
FOUR: list[Case] = [(4, 1, True, False), (2, 2, False, False), (2, 2, True, True)]


@pytest.mark.parametrize(("size", "cases"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_with_checkpointing_ranks_send_what_the_plan_says(ranks: Any, size: int, cases: list[Case]) -> None:
    for rank, of_rank in enumerate(ranks(size).run(measured, cases=cases)):
        for case, found in zip(cases, of_rank, strict=True):
            assert found == planned(rank, case, found), (rank, case)


@pytest.mark.parametrize(
    "name",
    [
        "gated_deltanet_7b",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("griffin_14b", "hgrn2_7b", "paralstm_7b")),
    ],
)
def test_sums_over_kinds_are_those_over_layers(name: str) -> None:
    """The search adds up one block of each kind."""
    config = load_config(ROOT / "configs" / f"{name}.yaml", []).model
    with torch.device("meta"):
        model = LM(config)
    passing, stages = Passing(config), stages_of(model, 4096, 4)
    twice = frozenset(range(0, len(config.layers), 2))
    for sequence, tensor, rows in ((1, 1, 1), (4, 1, 2), (1, 8, 1), (2, 2, 4)):
        split = Split(rows=rows, time=4096, sequence=sequence, tensor=tensor, index=sequence // 2)
        for stage in range(4):
            wanted: dict[tuple[str, str], Volume] = {}
            here = frozenset(i for i in twice if stages.bounds[stage] <= i < stages.bounds[stage + 1])
            for part in (traffic_of(model, split, stages, stage), resent(model, split, here)):
                for key, volume in part.items():
                    place = (key.axis, key.operation)
                    wanted[place] = wanted.get(place, Volume(0, 0)).plus(volume)
            found = passing.sums(split, stages.bounds, stage, twice)
            # Positions are gathered once a stage: at each attention block, as one block stands for all of its kind.
            extra = {("sequence", "all_gather")} if "attention" in config.layers and sequence > 1 else set()
            assert {k: v for k, v in found.items() if k not in extra} == {
                k: v for k, v in wanted.items() if k not in extra
            }, (name, split, stage)
            for place in extra:
                assert found[place].bytes == pytest.approx(wanted[place].bytes, rel=0.01)
