"""The process grid: which rank this is, on which device, and who it works with."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axes import AXES, Axis, axis_sizes, connect, make_axes

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """This process among all.

    Attributes:
        rank, world_size: over all processes.
        local_rank: on this machine; chooses the GPU.
        device: where this process computes.
        axes: the process grid's, by name (`parallel/axes.py`); all ranks along the data axis unless `arranged`.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    axes: dict[str, Axis] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.axes:
            sizes = dict.fromkeys(AXES, 1) | {"data": self.world_size}
            object.__setattr__(self, "axes", make_axes(self.rank, sizes))

    def arranged(self, *, pipeline: int = 1, sequence: int = 1, tensor: int = 1) -> "Grid":
        """The same ranks with so many along the pipeline, sequence and tensor axes, the rest along the data axis.
        Collective.

        Raises:
            ValueError: the ranks do not divide by the three; on all ranks, before anything is exchanged.
        """
        sizes = axis_sizes(self.world_size, pipeline=pipeline, sequence=sequence, tensor=tensor)
        connect(sizes)
        return dataclasses.replace(self, axes=make_axes(self.rank, sizes))

    @property
    def dp_rank(self) -> int:
        """This rank's place along the data axis: which rows it works on."""
        return self.axes["data"].index

    @property
    def dp_size(self) -> int:
        return self.axes["data"].size

    @property
    def is_lead(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the data axis, in place. Collective."""
        if self.dp_size > 1:
            dist.all_reduce(values, group=self.axes["data"].group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The lead's `value`, small and picklable, on every rank. Collective; what others pass is not looked at."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, small and picklable, by rank. Collective."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leaves the process group, once all ranks have come this far; for runs that end well."""
        dist.barrier()
        dist.destroy_process_group()


def everywhere(grid: Grid, action: Callable[[], T], error: type[Exception]) -> T:
    """Runs `action`, which must not communicate, on every rank; if it fails on any, all raise. Collective.

    So none waits in its next collective for a rank that has left.

    Args:
        grid: the ranks.
        action: what to do; `lambda: None` where a rank has nothing to do.
        error: what to raise, with one message on every rank: an `error` of `action` as it words itself, any other
            exception with its type and rank, several joined by semicolons.

    Returns:
        What `action` returned on this rank.
    """
    caught: Exception | None = None
    problem: str | None = None
    try:
        result = action()
    except Exception as exception:
        caught = exception
        problem = str(caught) if isinstance(caught, error) else f"rank {grid.rank}: {type(caught).__name__}: {caught}"
    problems: list[str | None] = [None] * grid.world_size
    dist.all_gather_object(problems, problem)
    distinct = list(dict.fromkeys(text for text in problems if text is not None))
    if distinct:
        raise error("; ".join(distinct)) from caught
    return result


def init_distributed(timeout_minutes: float = 30.0) -> Grid:
    """Joins the process group: the one `torchrun` describes in the environment, or a group of one without it.

    CPU tensors travel over gloo everywhere, so that checkpoints and small facts need no GPU; GPU tensors over NCCL.

    Args:
        timeout_minutes: a collective that takes longer raises, and takes the job down instead of letting it hang.

    Raises:
        ValueError: more processes on this machine than it has GPUs, or the environment describes the group by half.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed asks the environment for it
    device = _choose_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = _rendezvous(timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    _join_deepspeed()
    return Grid(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store through which ranks find each other, this rank and their number; a store of its own without torchrun.

    Processes that do not know of each other would each take themselves for the lead and write over one another's files:
    what hints at others is refused.

    After a failure torchrun starts new ranks on the store of the old ones. Under the old names they would find the
    addresses of the dead and wait for them, so each attempt has names of its own.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(given) == 1:
        raise ValueError(
            f"{given[0]}: {os.environ[given[0]]}, without the other of RANK and WORLD_SIZE; a group of processes needs "
            "both; start with torchrun, or unset it for one process"
        )
    if not given:
        tasks = os.environ.get("SLURM_NTASKS", "1")
        if tasks != "1":
            raise ValueError(
                f"SLURM_NTASKS: {tasks}, but neither RANK nor WORLD_SIZE is set; every task would train alone, all in "
                "one directory; start torchrun under srun, one task a node (srun --ntasks-per-node=1 torchrun ...), or "
                "ask for one task (--ntasks=1) to train in one process"
            )
        return dist.HashStore(), 0, 1
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}", store), rank, world_size


def _choose_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK: {local_rank}; this machine shows {torch.cuda.device_count()} GPUs; "
            "start at most that many processes on it (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join_deepspeed() -> None:
    """Lets DeepSpeed use the process group that exists."""
    import deepspeed

    # On a CPU it would compile a shared-memory all-reduce, a minute's work that needs a compiler; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    # torch warns that `all_gather_into_tensor` and `reduce_scatter_tensor`, by which DeepSpeed calls, are deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
