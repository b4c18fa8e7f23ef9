"""The benchmark of a training step runs every family, and refuses a peer that computes something else."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.training import PRESETS, configuration, main, of_ours, require_equal, transformer


def test_the_models_compared_are_about_as_large() -> None:
    for family in PRESETS:
        config = configuration(family, None, narrow=False)
        assert 0.95e9 < config.num_params() < 1.4e9
        assert transformer(config).num_params() == pytest.approx(config.num_params(), rel=0.15)


def test_an_implementation_is_asked_for_where_an_op_has_it() -> None:
    chosen = configuration("griffin", "triton", narrow=True).impl
    assert chosen is not None
    assert chosen["linear_scan"] == "triton"
    assert "attention" not in chosen


def test_a_peer_of_another_function_is_not_timed() -> None:
    cpu, input_ids = torch.device("cpu"), torch.arange(12).view(1, -1)
    ours, same, other = (
        of_ours(name, configuration("griffin", None, narrow=True), cpu, checkpointed, compiled=False)
        for name, checkpointed in MODELS
    )
    require_equal(ours, same, input_ids)
    with torch.no_grad():
        next(other.model.parameters()).mul_(3.0)
    with pytest.raises(SystemExit, match=r"other: loss .* where ours is .*; what differs is not compared"):
        require_equal(ours, other, input_ids)


MODELS = [("ours", False), ("same", True), ("other", False)]


@pytest.mark.slow
def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rehearse", "--output", str(tmp_path / "training")])
    figures = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))["results"]
    assert {row["family"] for row in figures} == set(PRESETS)
    assert {(row["length"], row["checkpointed"]) for row in figures} == {(64, False), (32, True), (128, True)}
    assert all(row["tokens_per_second"] > 0 for row in figures)
    assert len(capsys.readouterr().out.splitlines()) == len(figures)
