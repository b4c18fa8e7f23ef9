"""What ranks send, counted, equals its formulas: for every mixer, by layer and operation, and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import load_config
from models.lm import LM
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.traffic import Key, Volume, by_layer, counted, summary
from parallel.volume import Split, traffic_of
from tests.parallel.mixed import EVERY_MIXER, config_of, loss_of

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = 2
RECURRENT = ("rglru", "hgrn2", "gated_deltanet", "paralstm")
NO_FULL_ATTENTION = (*RECURRENT, "local_attention")
SETTINGS: dict[str, Any] = {"changes": {"attention": {"qk_norm": "full"}, "local_attention": {"qk_norm": "head"}}}
Case = tuple[int, int, int, bool, dict[str, Any]]
"""Sequence ranks, tensor ranks, tokens of a row, whether under bf16, settings of the model and among them whether
norms are sharded."""


def measured(grid: Grid, cases: list[Case]) -> list[dict[Key, Volume]]:
    """Of a forward and a backward pass."""
    from parallel.partition import build_model

    found = []
    for sequence, tensor, time, bf16, settings in cases:
        on = grid.arranged(sequence=sequence, tensor=tensor)
        of_model = {key: value for key, value in settings.items() if key != "sharded_norms"}
        parallel = ParallelConfig(
            sequence=sequence, tensor=tensor, sequence_sharded_norms=settings.get("sharded_norms", False)
        )
        model, _, _ = build_model(config_of(**of_model), on, seed=0, sequence_length=time, parallel=parallel)
        tokens = torch.randint(0, 61, (ROWS, time // sequence), generator=torch.Generator().manual_seed(grid.rank))
        first = on.axes["sequence"].index * time // sequence
        positions = torch.arange(first, first + time // sequence).expand(ROWS, -1)
        with counted(model) as traffic:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                nll, log_z = model(tokens, positions, tokens)
            loss_of(nll, log_z).backward()
        found.append(traffic.volumes)
    return found


def derived(rank: int, case: Case, found: dict[Key, Volume]) -> dict[Key, Volume]:
    """The formulas, with as many corrections as the nonlinear recurrence made."""
    sequence, tensor, time, bf16, settings = case
    of_model = {key: value for key, value in settings.items() if key != "sharded_norms"}
    with torch.device("meta"):
        model = LM(config_of(**of_model))
    layer = model.config.layers.index("paralstm")
    gathers = found.get(Key(f"blocks.{layer}", "sequence", "all_gather"), Volume(2, 0)).calls
    split = Split(
        rows=ROWS,
        time=time,
        sequence=sequence,
        tensor=tensor,
        index=rank // tensor % sequence,
        narrow=2 if bf16 else 4,
        sharded_norms=settings.get("sharded_norms", False),
        corrections=gathers - 1,
    )
    assert 1 <= split.corrections <= sequence
    return traffic_of(model, split)


WITHOUT: dict[str, Any] = {"layers": NO_FULL_ATTENTION}
FILTERS: dict[str, Any] = {
    "layers": ("gated_deltanet", "hgrn2", "paralstm"),
    "tied": False,
    "changes": {"gated_deltanet": {"conv_width": None}, "hgrn2": {"conv_width": 1}},
}


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (
            2,
            [
                (1, 2, 24, True, SETTINGS | {"sharded_norms": True}),
                (2, 1, 24, False, {}),
                (2, 1, 24, True, SETTINGS),
                (1, 2, 24, False, FILTERS),
                (1, 2, 24, True, SETTINGS),
            ],
        ),
        (3, [(3, 1, 24, False, WITHOUT)]),
        (
            4,
            [
                (2, 2, 24, False, WITHOUT | {"sharded_norms": True}),
                (4, 1, 24, False, {}),
                (2, 2, 24, True, WITHOUT),
                (1, 4, 24, False, {}),
                (1, 2, 24, False, {}),
            ],
        ),
    ],
)
def test_what_is_sent_equals_its_formulas(ranks: Any, size: int, cases: list[Case]) -> None:
    for rank, of_rank in enumerate(ranks(size).run(measured, cases=cases)):
        for case, found in zip(cases, of_rank, strict=True):
            assert found == derived(rank, case, found), case


def test_what_recurrences_send_does_not_grow_with_the_row(ranks: Any) -> None:
    recurrent: dict[str, Any] = {"layers": RECURRENT}
    short, long = ranks(2).run(measured, cases=[(2, 1, 24, False, recurrent), (2, 1, 96, False, recurrent)])[0]
    assert {key.layer for key in short} == {f"blocks.{i}" for i in range(len(RECURRENT))}
    assert short == long


def test_full_attention_grows_with_the_row(ranks: Any) -> None:
    settings: dict[str, Any] = {"layers": ("attention",)}
    short, long = ranks(2).run(measured, cases=[(2, 1, 24, False, settings), (2, 1, 96, False, settings)])[0]
    assert {key: Volume(volume.calls, 4 * volume.bytes) for key, volume in short.items()} == long


def test_the_figures_of_the_presets_in_the_documentation() -> None:
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    for name in ("griffin_7b", "hgrn2_7b", "gated_deltanet_7b", "paralstm_7b"):
        with torch.device("meta"):
            model = LM(load_config(ROOT / "configs" / f"{name}.yaml", []).model)
        found = traffic_of(model, Split(rows=1, time=32768, sequence=8, index=1, corrections=2))
        total = sum(volume.bytes for volume in found.values()) / 1e6
        calls = sum(volume.calls for volume in found.values())
        assert re.search(rf"{name}\s+{total:.0f}\s+MB\s+in\s+{calls}[ ,.]", text), (name, total, calls)
        for kind in set(model.config.layers):
            layer = f"blocks.{model.config.layers.index(kind)}"
            sent = {key.operation: volume.bytes for key, volume in found.items() if key.layer == layer}
            states = sent.get("all_gather", 0) + sent.get("reduce_scatter", 0)
            for size in (states, sent.get("send", 0), sent.get("all_to_all", 0)):
                assert size < 5e4 - 1e3 or f" {size / 1e6:.2f} MB |" in text, (name, kind, size)


def test_one_rank_sends_nothing() -> None:
    assert traffic_of(LM(config_of(EVERY_MIXER)), Split(rows=ROWS, time=24)) == {}


def test_the_log_tells_calls_and_bytes_by_axis_operation_and_layer() -> None:
    volumes = {Key(f"blocks.{i}", "tensor", "all_reduce"): Volume(2, 1000) for i in range(3)}
    volumes[Key("blocks.0", "sequence", "send")] = Volume(1, 8)
    assert summary(volumes) == "sequence send: 1 calls, 8 bytes; tensor all_reduce: 6 calls, 3,000 bytes"
    reduced = {"tensor all_reduce": {"calls": 2, "bytes": 1000}}
    first = reduced | {"sequence send": {"calls": 1, "bytes": 8}}
    assert by_layer(volumes) == {"blocks.0": first, "blocks.1": reduced, "blocks.2": reduced}
