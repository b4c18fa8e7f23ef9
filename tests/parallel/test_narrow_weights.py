"""The bf16 copies that autocast makes of weights: one a step, shared by all passes; under ZeRO 3 none that outlives its
use. They change no result."""

import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.plan.trace import is_weight_copy
from parallel.plan.world import imagined_world
from tests.parallel.engines import Curve, Split, engine_of, global_batch, learning_rate, microbatches, take
from tests.parallel.mixed import config_of
from tests.parallel.plans import planner_of

FULL: dict[str, Any] = {"activation_checkpointing": "full"}
Case = tuple[Split, dict[str, Any]]
STAGED, PLAIN = Split(2, num_microbatches=4), Split(num_microbatches=2)
CASES: list[Case] = [(STAGED, FULL), (PLAIN._replace(zero=3), FULL)]
MORE: list[Case] = [(STAGED, {}), (PLAIN, FULL)]


class Copies(TorchDispatchMode):
    """Counts those made of each matrix, and the most entries of all that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[int] = Counter()
        self.alive = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if is_weight_copy(func, args):
            self.made[id(args[0])] += 1
            self.alive += out.numel()
            self.most = max(self.most, self.alive)
            weakref.finalize(out.untyped_storage(), self._gone, out.numel())
        return out

    def _gone(self, entries: int) -> None:
        self.alive -= entries


def step(grid: Grid, case: Case, keeps: bool = True) -> tuple[Counter[int], int, int, Curve]:
    """How often how many matrices were copied; entries alive at once, and after the step; and the next steps' curve."""
    split, parallel = case
    engine = engine_of(grid, split, config_of(), precision="bf16", parallel=dict(parallel))
    with mock.patch.object(engine, "_narrow_weights", engine._narrow_weights if keeps else nullcontext):
        with Copies() as copies:
            engine.step(microbatches(engine, global_batch(0)), learning_rate(0))
        curve = take(engine, range(1, 3))
    return Counter(copies.made.values()), copies.most, copies.alive, curve


def planned(case: Case) -> list[float]:
    """Entries that are alive at once by the planner, on each of two ranks."""
    split, parallel = case
    settings = ParallelConfig(pipeline=split.pipeline, **parallel)
    with imagined_world(2):
        found = planner_of(parallel=settings, precision="bf16").as_configured(2)
        return [found._copies(rank % split.pipeline) / 2 for rank in range(2)]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_a_step_makes_one_of_each_weight(ranks: Any, case: Case) -> None:
    split, _ = case
    wanted = [None] * 2 if split.zero == 3 else planned(case)
    all_kept, all_plain = (ranks(2).run(step, case=case, keeps=keeps) for keeps in (True, False))
    for kept, plain, entries in zip(all_kept, all_plain, wanted, strict=True):
        (made, most, after, curve), (usual, usual_most, _, usual_curve) = kept, plain
        assert curve == usual_curve, "to the bit"
        assert after == 0
        assert min(usual) >= split.num_microbatches, "by itself autocast makes as many as there are microbatches"
        if split.zero == 3:
            assert 0 < most < usual_most / 2
        else:
            assert set(made) == {1}
            assert most == entries
