"""Plans of small models, for tests."""

from types import SimpleNamespace
from typing import Any

from parallel.config import ParallelConfig
from parallel.plan.hardware import Hardware, hardware_named
from parallel.plan.search import Planner
from tests.parallel.mixed import TIME, config_of
from training.config import TrainConfig


def planner_of(
    *,
    parallel: ParallelConfig | None = None,
    hardware: Hardware | None = None,
    time: int = TIME,
    rows: int = 1,
    batch_size: int = 8,
    precision: str = "fp32",
    **settings: Any,
) -> Planner:
    """Of `config_of(**settings)`, inside an imagined world."""
    train: Any = {"precision": precision}
    run = SimpleNamespace(
        name="small",
        model=config_of(**settings),
        data=SimpleNamespace(sequence_length=time),
        train=TrainConfig(steps=1, batch_size=batch_size, micro_batch_size=rows, **train),
        parallel=parallel or ParallelConfig(),
    )
    return Planner(run, hardware or hardware_named("CPU"))
