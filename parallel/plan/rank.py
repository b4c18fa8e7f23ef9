"""One rank of a large job, built without data under an imagined process group, and held against the plan."""

from dataclasses import dataclass

from parallel.partition import cut_model
from parallel.plan.estimate import KINDS
from parallel.plan.hardware import GB
from parallel.plan.search import Planner
from parallel.plan.state import share_of_group
from parallel.plan.world import imagined_grid
from training.optimizer import parameter_groups


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """What a rank holds.

    Attributes:
        rank, gpus: which, of how many.
        place: its index along pipeline, data, sequence and tensor.
        blocks: the first, and the one after the last.
        parameters: entries of its stage's and tensor rank's parameters, built.
        predicted: the same by the plan's tables.
        whole: of the model.
        groups: entries of each of AdamW's groups, of them those that the rank updates, what fills up included, and the
            first of these in the group's flat tensor; under ZeRO 3, which cuts each parameter, None.
        memory: bytes by kind.
    """

    rank: int
    gpus: int
    place: dict[str, int]
    blocks: tuple[int, int]
    parameters: int
    predicted: int
    whole: int
    groups: tuple[tuple[int, int, int | None], ...]
    memory: dict[str, float]

    def __str__(self) -> str:
        where = ", ".join(f"{axis} {index}" for axis, index in self.place.items())
        runs = "; ".join(
            f"{total:,}: {share:,}, {'of each parameter a part' if first is None else f'the first is {first:,}'}"
            for total, share, first in self.groups
        )
        sizes = ", ".join(f"{kind} {self.memory[kind] / GB:.2f}" for kind in KINDS)
        return (
            f"rank {self.rank} of {self.gpus} ({where}) holds blocks {self.blocks[0]} to {self.blocks[1] - 1}\n"
            f"parameters, built: {self.parameters:,} of {self.whole:,}; by the plan: {self.predicted:,}\n"
            f"entries it updates of AdamW's groups of {runs}\n"
            f"memory, GB: {sizes}"
        )


def build_rank(planner: Planner, gpus: int, rank: int) -> RankPlan:
    """Builds the share of `rank` as a run does, on the meta device. Inside an imagined world of that rank.

    Raises:
        ValueError: the run cannot be arranged so.
        RuntimeError: the plan is wrong about what is built.
    """
    run, split = planner.run, planner.run.parallel
    grid = imagined_grid(gpus, rank, pipeline=split.pipeline, sequence=split.sequence, tensor=split.tensor)
    model, _, partition, _ = cut_model(
        run.model,
        grid,
        sequence_length=run.data.sequence_length,
        parallel=split,
        device_type=planner.blocks.device_type,
    )
    assert partition.stages is not None
    found, stage = planner.as_configured(gpus), grid.axes["pipeline"].index
    index, ranks = grid.axes["replicas"].index, grid.axes["replicas"].size
    groups: list[tuple[int, int, int | None]] = []
    for group in parameter_groups(model, 0.0):
        sizes = [parameter.numel() for parameter in group["params"]]
        share = share_of_group(sizes, ranks, split.zero_stage)
        first = {0: 0, 3: None}.get(split.zero_stage, index * share)
        groups.append((sum(sizes), share, first))
    built = sum(parameter.numel() for parameter in model.parameters())
    predicted = found.state(stage, index).entries
    if built != predicted:
        raise RuntimeError(f"rank {rank}: {built} parameters are built, {predicted} are planned")
    return RankPlan(
        rank=rank,
        gpus=gpus,
        place={name: grid.axes[name].index for name in ("pipeline", "data", "sequence", "tensor")},
        blocks=partition.stages.bounds[stage : stage + 2],  # type: ignore[arg-type]
        parameters=built,
        predicted=predicted,
        whole=sum(shape.numel() for shape in partition.shapes.values()),
        groups=tuple(groups),
        memory=found.memory(stage),
    )
