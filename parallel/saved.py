"""What a save that is complete has cost."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        path, step: of the checkpoint.
        num_bytes: of tensors, over all ranks.
        stall: seconds that the training loop waited, for the save before and for the copy to host memory.
        write_seconds: that the slowest rank took to write, sync and hash its file.
        seconds: from the call of `save` until the checkpoint was found complete at a step boundary.
        problems: what could not be removed of older checkpoints; on the lead.
    """

    path: Path
    step: int
    num_bytes: int
    stall: float
    write_seconds: float
    seconds: float
    problems: tuple[str, ...] = ()

    @property
    def figures(self) -> dict[str, float]:
        """For `metrics.jsonl`, in bytes and seconds."""
        return {
            "save_bytes": self.num_bytes,
            "save_stall": self.stall,
            "save_write_seconds": self.write_seconds,
            "save_seconds": self.seconds,
        }

    def __str__(self) -> str:
        figures = (
            f"{self.path}: {self.num_bytes / 1e9:.3g} GB, training waited {self.stall:.2f} s, written in "
            f"{self.write_seconds:.2f} s ({self.num_bytes / self.write_seconds / 1e9:.3g} GB/s), complete after "
            f"{self.seconds:.2f} s"
        )
        return "; ".join((figures, *self.problems))
