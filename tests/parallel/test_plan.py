"""The planner as it is used: which arrangements it looks at, its page, one rank built, and runs that do not fit."""

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import configs.show
import train
from configs.schema import load_config
from parallel.config import ParallelConfig
from parallel.plan.__main__ import main
from parallel.plan.estimate import KINDS
from parallel.plan.hardware import HARDWARE, Hardware
from parallel.plan.misfit import least, problem
from parallel.plan.rank import build_rank
from parallel.plan.scaling import BIG, PAGE, failure_row, topology_row
from parallel.plan.scaling import planner_of as planner_of_page
from parallel.plan.search import SAFE, Planner
from parallel.plan.world import imagined_world
from tests.parallel.mixed import EVERY_MIXER
from tests.parallel.plans import planner_of

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = str(ROOT / "tests" / "assets" / "tiny.yaml")
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*b.yaml"))


def machine(memory: float) -> Hardware:
    return Hardware(**{**vars(HARDWARE["CPU"]), "memory": memory})


def test_arrangements_are_all_that_the_sizes_allow() -> None:
    """Counted anew: heads divide by 4, rows of 24 tokens by 2, 3, 4 and 6, of which the search takes powers of two."""
    with imagined_world(8):
        found = list(planner_of(layers=("rglru", "hgrn2"), batch_size=8).admissible(8))
    places = {(a.parallel.pipeline, a.parallel.sequence, a.parallel.tensor, a.rows) for a in found}
    wanted = {
        (pipeline, sequence, tensor, rows)
        for pipeline, sequence, tensor in itertools.product((1, 2), (1, 2, 4, 8), (1, 2, 4))
        for rows in (1, 2, 4, 8)
        if 8 % (pipeline * sequence * tensor) == 0
        and 8 % (rows * (8 // (pipeline * sequence * tensor))) == 0
        and 24 % sequence == 0
        and 24 // sequence >= 3  # the convolution looks back three tokens
    }
    assert places == wanted
    for arrangement in found:
        split = arrangement.parallel
        assert split.zero_stage < 2 or split.pipeline == 1
        assert arrangement.num_microbatches * arrangement.rows * arrangement.data == 8
    assert len({(a.parallel.zero_stage, a.parallel.activation_checkpointing) for a in found}) == 12


def test_the_fastest_comes_first_and_what_does_not_fit_last() -> None:
    with imagined_world(4):
        planner = planner_of(layers=("rglru", "hgrn2"), batch_size=8, hardware=machine(2e6))
        fitting, others = planner.ranked(4)
        assert fitting
        assert others
        assert all(found.bytes <= SAFE * 2e6 for found in fitting)
        assert all(found.bytes > SAFE * 2e6 for found in others)
        steps = [found.times.step for found in fitting]
    assert steps == sorted(steps)


def test_more_ranks_hold_less_and_checkpointing_costs_time() -> None:
    with imagined_world(4):

        def estimate(**parallel: Any) -> Any:
            return planner_of(batch_size=8, parallel=ParallelConfig(**parallel)).as_configured(4)

        plain, cut, full = estimate(zero_stage=1), estimate(zero_stage=1, tensor=2), None
        full = estimate(zero_stage=1, activation_checkpointing="full")
        assert cut.largest[1]["weights"] < 0.6 * plain.largest[1]["weights"]
        assert full.largest[1]["activations"] < 0.6 * plain.largest[1]["activations"]
        assert full.times.compute > 1.15 * plain.times.compute
        stages = estimate(zero_stage=1, pipeline=2)
        assert stages.times.bubble / (stages.times.compute + stages.times.exchange) == pytest.approx(1 / 4)
        assert {axis for axis, _ in stages.volumes} == {"pipeline", "data"}


def test_every_rank_of_a_job_is_planned_as_it_is_built() -> None:
    split = ParallelConfig(pipeline=2, tensor=2, zero_stage=1)
    with imagined_world(8):
        planner = planner_of(layers=EVERY_MIXER, parallel=split, batch_size=8, tied=False)
        found = [build_rank(planner, 8, rank) for rank in range(8)]
    assert [plan.place["pipeline"] for plan in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found[0].blocks[1] == found[4].blocks[0]
    assert sum(plan.parameters for plan in found if plan.place["data"] == 0) >= found[0].whole
    assert "holds blocks 0 to" in str(found[0])


def run_of(memory_shape: dict[str, Any]) -> Any:
    return load_config(TINY, [f"{key}={value}" for key, value in memory_shape.items()])


def test_a_run_that_cannot_fit_is_told_what_would() -> None:
    run = run_of({"train.batch_size": 8, "train.micro_batch_size": 2})
    assert problem(run, 2, machine(1e9)) is None
    with imagined_world(2):
        need = least(Planner(run, machine(1e9)).as_configured(2))
    said = problem(run, 2, machine(0.9 * need)) or ""
    first, *table = said.splitlines()
    assert first.startswith("parallel: 2 GPUs: the run takes ")
    assert "it must fit; pass parallel.pipeline=" in first
    assert "ZeRO" in "\n".join(table)
    assert "Run it with: parallel.pipeline=" in said
    nothing = problem(run, 2, machine(1e5)) or ""
    assert "take more GPUs, or a shorter data.sequence_length" in nothing
    assert problem(run, 3, machine(1e5)) is None, "a batch that 3 ranks cannot share is refused by others"


def test_training_refuses_it_before_anything_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=10**5)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=device),
        mock.patch.object(train, "train", side_effect=AssertionError("built")),
    ):
        assert train.main([TINY, f"log.directory={tmp_path}"]) == 1
        said = capsys.readouterr().err
        (left,) = tmp_path.iterdir()
        assert left.name == ".tiny.refused.json", "the reason, for whoever started it"
        left.unlink()
        assert configs.show.main([TINY, f"log.directory={tmp_path}", "--ranks", "2", "--check"]) == 1
    assert said.startswith("train.py: parallel: 1 GPUs: the run takes ")
    assert "none of" in said
    assert capsys.readouterr().err.startswith("configs.show: parallel: 2 GPUs: the run takes ")
    assert not list(tmp_path.iterdir())


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, "--gpus", "2", "--hardware", "cpu", "--json", "--top", "2"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert set(first["memory"]) == set(KINDS)
    assert first["memory_total"] == pytest.approx(sum(first["memory"].values()))
    assert first["seconds"]["step"] <= second["seconds"]["step"]
    assert main([TINY, "--gpus", "2", "--hardware", "cpu", "--top", "3"]) == 0
    assert "Computed, not measured." in capsys.readouterr().out
    assert main([TINY, "--gpus", "2", "--hardware", "cpu", "--gpu-memory", "0.0001"]) == 1
    assert "but a GPU has 0.0 GB" in capsys.readouterr().err
    assert main([TINY, "--gpus", "2", "--hardware", "V100"]) == 1
    assert "--hardware: 'V100'; must be one of H100" in capsys.readouterr().err
    for wrong in (["--gpus", "0"], ["--gpus", "2", "--rank", "2"], ["--gpus", "2", "--rank", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            main([TINY, *wrong])
    assert "--rank: -1; must be among the ranks of the job, 0 to 1" in capsys.readouterr().err
    assert main([TINY, "--gpus", "2", "--rank", "1", "--hardware", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("rank 1 of 2 (pipeline 0, data 1, ")


def test_the_page_on_scaling_has_the_failures_of_the_closed_form() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for gpus in BIG:
        assert failure_row(gpus) in text, gpus


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hgrn2_7b", "griffin_14b"])
def test_the_page_on_scaling_is_what_the_planner_says(name: str) -> None:
    with imagined_world(8):
        assert topology_row(name, 8, 4096, planner_of_page(name, 4096)) in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_at_8_to_1024_gpus_in_seconds(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for gpus in (8, 64, 512, 1024):
        start = time.process_time()
        code = main([str(ROOT / "configs" / f"{name}.yaml"), "train.batch_size=1024", "--gpus", str(gpus), "--json"])
        assert code in (0, 1)
        assert time.process_time() - start < 60
        fitting = json.loads(capsys.readouterr().out)
        assert bool(fitting) == (code == 0)
        assert fitting or gpus < 64, "64 GPUs hold every preset"
        for found in fitting:
            assert found["memory_total"] <= SAFE * HARDWARE["H100"].memory
            assert 0 < found["mfu"] < 0.7
