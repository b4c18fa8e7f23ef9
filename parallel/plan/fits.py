"""The questions before a run is built: does the model divide, and does it fit the GPU?"""

import os
from dataclasses import replace
from typing import Any

import torch

from ops.impl import shapes_alone
from parallel.plan.hardware import Hardware, nearest


def refuse_indivisible(run: Any, ranks: int) -> None:
    """Raises ValueError if the model cannot be cut over the run's axes. Not inside a job; kernels that this machine
    cannot run are no reason."""
    from parallel.partition import cut_model  # these take seconds to import
    from parallel.plan.world import imagined_grid, imagined_world

    split = run.parallel
    with imagined_world(ranks), shapes_alone():
        grid = imagined_grid(ranks, pipeline=split.pipeline, sequence=split.sequence, tensor=split.tensor)
        cut_model(run.model, grid, sequence_length=run.data.sequence_length, parallel=split, device_type="cpu")


def refuse_too_large(run: Any, ranks: int | None = None, machine: Hardware | None = None) -> None:
    """Before anything is built: raises ValueError, with the planner's table, if the run cannot fit its GPUs.

    Args:
        run: the run.
        ranks: on how many; as many as the launcher started if None.
        machine: the GPUs; if None this rank's, and on a CPU there is nothing to ask.
    """
    machine = machine or _here()
    if machine is None:
        return
    from parallel.plan.misfit import problem  # takes seconds to import, and no CPU needs it

    if (reason := problem(run, ranks or int(os.environ.get("WORLD_SIZE", "1")), machine)) is not None:
        raise ValueError(reason)


def _here() -> Hardware | None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():  # which is refused elsewhere
        return None
    device = torch.cuda.get_device_properties(local_rank)
    return replace(nearest(device.name), memory=float(device.total_memory))
