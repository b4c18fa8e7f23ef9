import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.grid import Grid, everywhere, init_distributed
from tests.parallel.launch import CPU_ONLY


def describe(grid: Grid) -> tuple[Grid, Tensor]:
    return grid, grid.sum(torch.tensor([grid.rank + 1, 2**40]))


def test_ranks_form_one_group(ranks):
    (first, total), (second, _) = ranks(2).run(describe)
    assert (first.rank, second.rank) == (0, 1)
    assert first.world_size == first.dp_size == 2
    assert second.dp_rank == second.local_rank == 1
    assert first.is_lead
    assert not second.is_lead
    assert first.device == torch.device("cpu")
    assert torch.equal(total, torch.tensor([3, 2**41]))


def share(grid: Grid) -> list[Any]:
    """A broadcast; actions that all can do, that one rank cannot do, and that each cannot do for its own reason."""

    def fail(rank: int, error: Exception) -> int:
        if grid.rank == rank:
            raise error
        return grid.rank

    outcomes: list[Any] = [grid.broadcast({"from": grid.rank}), everywhere(grid, lambda: grid.rank, ValueError)]
    for action in (
        lambda: fail(1, ValueError("key: 7")),
        lambda: fail(0, KeyError("absent")),
        lambda: fail(grid.rank, ValueError(f"{grid.rank}")),
    ):
        try:
            outcomes.append(everywhere(grid, action, ValueError))
        except ValueError as error:
            outcomes.append((str(error), type(error.__cause__).__name__))
    return outcomes


def test_what_fails_on_one_rank_is_raised_on_all(ranks):
    first, second = ranks(2).run(share)
    absent = "rank 0: KeyError: 'absent'"
    assert first == [{"from": 0}, 0, ("key: 7", "NoneType"), (absent, "KeyError"), ("0; 1", "ValueError")]
    assert second == [{"from": 0}, 1, ("key: 7", "ValueError"), (absent, "NoneType"), ("0; 1", "ValueError")]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "1"}, "RANK: 1, without the other of RANK and WORLD_SIZE; .* torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2, without the other of RANK and WORLD_SIZE; .* torchrun"),
        ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS: 8, but neither .*start torchrun under srun, one task a node"),
    ],
)
def test_a_group_known_by_half_is_refused(monkeypatch, env, message):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        init_distributed()
    assert not dist.is_initialized()


def test_importing_the_engine_prints_nothing():
    env = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "DEEPSPEED_LOG_LEVEL")}
    program = "import parallel.engine, os; assert os.environ['DS_ACCELERATOR'] == 'cpu'"
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_one_process_needs_no_launcher():
    program = (
        "import torch.distributed as dist\n"
        "from parallel.grid import init_distributed\n"
        "grid = init_distributed(timeout_minutes=1)\n"
        "from tests.parallel.tiny import tiny_engine, train\n"
        "results = train(tiny_engine(grid, zero_stage=1), range(2))\n"
        "assert all(tokens == 22 for *_, tokens in results)\n"
        "print(grid.rank, grid.world_size, grid.device, dist.get_backend())\n"
        "grid.close()\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "SLURM_NTASKS")}
    done = subprocess.run([sys.executable, "-c", program], env=env | CPU_ONLY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 1 cpu gloo\n"
    assert "Warning" not in done.stderr
