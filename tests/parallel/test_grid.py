import os
import subprocess
import sys

import torch
from torch import Tensor

from parallel.grid import Grid
from tests.parallel.launch import CPU_ONLY


def describe(grid: Grid) -> tuple[Grid, Tensor, bool, bool]:
    return grid, grid.sum(torch.tensor([grid.rank + 1, 2**40])), grid.any(grid.rank == 1), grid.any(False)


def test_ranks_form_one_group(ranks):
    (first, total, some, none), (second, *_) = ranks(2).run(describe)
    assert (first.rank, second.rank) == (0, 1)
    assert first.world_size == first.dp_size == 2
    assert second.dp_rank == second.local_rank == 1
    assert first.is_lead
    assert not second.is_lead
    assert first.device == torch.device("cpu")
    assert torch.equal(total, torch.tensor([3, 2**41]))
    assert some
    assert not none


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
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run([sys.executable, "-c", program], env=env | CPU_ONLY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 1 cpu gloo\n"
    assert "Warning" not in done.stderr
