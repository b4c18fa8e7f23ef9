"""Why a run does not fit its GPUs, and what would."""

from parallel.plan.estimate import Estimate
from parallel.plan.hardware import GB, Hardware
from parallel.plan.search import Planner, Run
from parallel.plan.table import overrides, page, refusal
from parallel.plan.world import imagined_world

SHOWN = 6
TOLERANCE = 0.15
"""Of activations, by which the planner may be wrong: a run is refused only if it cannot fit all the same."""


def misfit(found: Estimate, machine: Hardware) -> str:
    """That an arrangement is larger than its GPU, and what it is made of."""
    return f"{found.arrangement.gpus} GPUs: the run takes {refusal(found)}, but a GPU has {machine.memory / GB:.1f} GB"


def least(found: Estimate) -> float:
    """Bytes that the fullest GPU needs if activations are overrated, and buffers find room in gaps."""
    memory = found.largest[1]
    certain = memory["weights"] + memory["gradients"] + memory["optimizer"]
    return certain + (1 - TOLERANCE) * (memory["activations"] + memory["state"])


def problem(run: Run, gpus: int, machine: Hardware) -> str | None:
    """Why the run as it is configured does not fit `gpus` of `machine`, with what does; None if it fits. What cannot be
    arranged at all is for others to refuse. Not inside a job."""
    split = run.parallel
    taken = split.pipeline * split.sequence * split.tensor
    if gpus % taken or run.train.batch_size % (run.train.micro_batch_size * (gpus // taken)):
        return None
    with imagined_world(gpus):
        planner = Planner(run, machine)
        if not planner.admits():
            return None
        found = planner.as_configured(gpus)
        if least(found) <= machine.memory:
            return None
        fitting, others = planner.ranked(gpus)
        table = page(run.name, gpus, machine, fitting, len(others), SHOWN)
    way_out = f"pass {overrides(fitting[0])}" if fitting else "take more GPUs, or a shorter data.sequence_length"
    return f"parallel: {misfit(found, machine)}; it must fit; {way_out}\n{table}"
