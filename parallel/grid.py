"""The process grid: which rank this is, on which device, and who it works with."""

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Grid:
    """This process among all.

    Attributes:
        rank, world_size: over all processes.
        local_rank: on this machine; chooses the GPU.
        dp_rank, dp_size: along the data axis.
        device: where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    dp_rank: int
    dp_size: int
    device: torch.device

    @property
    def is_lead(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank. Collective; a CPU tensor travels, so no device waits."""
        return bool(self.sum(torch.tensor([float(flag)])).item())

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the data-parallel ranks, in place. Collective."""
        dist.all_reduce(values)
        return values

    def close(self) -> None:
        """Leaves the process group, once all ranks have come this far; for runs that end well."""
        dist.barrier()
        dist.destroy_process_group()


def init_distributed(timeout_minutes: float = 30.0) -> Grid:
    """Joins the process group: the one `torchrun` describes in the environment, or a group of one without it.

    CPU tensors travel over gloo everywhere, so that checkpoints and small facts need no GPU; GPU tensors over NCCL.

    Args:
        timeout_minutes: a collective that takes longer raises, and takes the job down instead of letting it hang.

    Raises:
        ValueError: more processes on this machine than it has GPUs.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed asks the environment for it
    device = _choose_device(local_rank)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = _rendezvous(timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    _join_deepspeed()
    return Grid(
        rank=rank, world_size=world_size, local_rank=local_rank, dp_rank=rank, dp_size=world_size, device=device
    )


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store through which ranks find each other, this rank and their number; a store of its own without torchrun.

    After a failure torchrun starts new ranks on the store of the old ones. Under the old names they would find the
    addresses of the dead and wait for them, so each attempt has names of its own.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
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
    # It calls collectives under names that torch is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
