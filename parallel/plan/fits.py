"""The question before a run is built: does it fit the GPU?"""

import os
from dataclasses import replace
from typing import Any

import torch

from parallel.plan.hardware import nearest


def refuse_too_large(run: Any, ranks: int | None = None) -> None:
    """Before anything is built: raises ValueError, with the planner's table, if the run cannot fit this rank's GPU. On
    a CPU there is nothing to ask.

    Args:
        run: the run.
        ranks: on how many; as many as the launcher started if None.
    """
    if not torch.cuda.is_available():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        return  # refused elsewhere
    from parallel.plan.misfit import problem  # takes seconds to import, and no CPU needs it

    device = torch.cuda.get_device_properties(local_rank)
    machine = replace(nearest(device.name), memory=float(device.total_memory))
    if (reason := problem(run, ranks or int(os.environ.get("WORLD_SIZE", "1")), machine)) is not None:
        raise ValueError(reason)
