"""The tables of docs/scaling.md: `python -m parallel.plan.scaling` writes them into the page, between its marks.

Everything in them is computed by the planner and by `parallel/plan/goodput.py`; a test holds rows against the page.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.schema import RunConfig, load_config
from parallel.plan.estimate import Estimate
from parallel.plan.goodput import Job, at_best, best_interval, goodput, simulated
from parallel.plan.hardware import GB, HARDWARE
from parallel.plan.search import Planner
from parallel.plan.table import checkpointing
from parallel.plan.world import imagined_world

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "scaling.md"
MODELS = ("griffin_14b", "hgrn2_7b", "gated_deltanet_7b", "paralstm_7b")
GPUS = (8, 64, 512)
LENGTHS = (4096, 32768, 262144)
TOKENS = 2**22
"""Of a step: 4M, so that 512 GPUs have a row of 4k each and 16 rows of 256k make a step."""
KERNELS = {
    "linear_scan": "triton",
    "gated_linear_attention": "triton",
    "gated_delta_rule": "triton",
    "diagonal_lstm": "triton",
    "causal_conv1d": "triton",
    "rms_norm": "triton",
    "rotary": "triton",
    "linear_cross_entropy": "triton",
    "attention": "flex",
    "local_attention": "flex",
}
"""What a GPU is meant to run."""

TRAFFIC = 2 * GB
"""Bytes a second that each rank writes to a shared file system."""
COPY = 20 * GB
"""Bytes a second that a GPU's checkpoint is copied to its host, training waiting."""
RESTART = 600.0
"""Seconds from a failure to the first step after it."""
BIG = (512, 1024, 4096, 10240)
LARGE_BATCHES = (5120 * 4096, 20480 * 4096)
"""Tokens of a step on 10,240 GPUs."""
HEAD = " | preset | GPUs | T | ranks, microbatches | ZeRO | run twice | GB, most of it | step, s | bubble | MFU |"
RULE = "|---|---|---|---|---|---|---|---|---|---|"


def run_of(name: str, length: int, tokens: int = TOKENS) -> RunConfig:
    """The preset with rows of `length`, kernels, and so many tokens a step."""
    run = load_config(ROOT / "configs" / f"{name}.yaml", [])
    model = replace(run.model, impl=KERNELS)
    rows = tokens // length
    train = replace(run.train, batch_size=rows, micro_batch_size=1)
    return replace(run, model=model, data=replace(run.data, sequence_length=length), train=train)


def planner_of(name: str, length: int, tokens: int = TOKENS) -> Planner:
    return Planner(run_of(name, length, tokens), HARDWARE["H100"])


def topology_row(name: str, gpus: int, length: int, planner: Planner) -> str:
    """One row of the table: what the fastest arrangement is, takes and does; or the smallest one that does not fit."""
    fitting, others = planner.ranked(gpus)
    first = f"| {name} | {gpus} | {length // 1024}k |"
    if not fitting:
        return f"{first} none fits: {others[0].bytes / GB:.0f} GB at least |  |  |  |  |  |  |"
    best = fitting[0]
    memory, split = best.largest[1], best.arrangement.parallel
    share = max(("activations", "weights", "optimizer", "gradients", "logits", "buffers"), key=lambda k: memory[k])
    return (
        f"{first} {ranks(best)} | {split.zero_stage} | {checkpointing(best)} | {best.bytes / GB:.0f}, "
        f"{share} {memory[share] / GB:.0f} | {best.times.step:.2f} | {best.times.bubble / best.times.step:.0%} | "
        f"{best.mfu:.0%} |"
    )


def ranks(found: Estimate) -> str:
    """PP4 TP2 DP8, mb 1 x 16."""
    split, arrangement = found.arrangement.parallel, found.arrangement
    sizes = {"PP": split.pipeline, "SP": split.sequence, "TP": split.tensor, "DP": arrangement.data}
    parts = " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
    return f"{parts or 'one GPU'}, mb {arrangement.rows} x {arrangement.num_microbatches}"


def topologies(name: str) -> Iterator[str]:
    yield HEAD.strip()
    yield RULE
    with imagined_world(max(GPUS)):
        planners = [planner_of(name, length) for length in LENGTHS]
        for length, planner in zip(LENGTHS, planners):
            planner.blocks.kind = planners[0].blocks.kind  # looked at once: all have rows longer than its passes
            for gpus in GPUS:
                yield topology_row(name, gpus, length, planner)


def large() -> Iterator[str]:
    """The largest number of GPUs, from batches that they can share."""
    yield "| tokens a step" + HEAD
    yield "|---" + RULE
    gpus, name, length = BIG[-1], MODELS[0], LENGTHS[0]
    with imagined_world(gpus):
        kind = None
        for tokens in LARGE_BATCHES:
            planner = planner_of(name, length, tokens)
            planner.blocks.kind = kind = kind or planner.blocks.kind
            yield f"| {tokens / 1e6:.0f}M {topology_row(name, gpus, length, planner)}"


def job_of(gpus: int, parameters: int = 13_993_159_680, interval: float = 3600.0) -> Job:
    """A job of 14B whose checkpoints are copied and written by all ranks side by side."""
    size = 12 * parameters / gpus
    return Job(gpus=gpus, interval=interval, wait=0.5 + size / COPY, write=10 + size / TRAFFIC, restart=RESTART)


def failure_row(gpus: int) -> str:
    best = at_best(job_of(gpus))
    hourly = goodput(job_of(gpus))
    return (
        f"| {gpus} | {best.between_failures / 3600:.1f} h | {best.wait:.1f} s | {best.write:.0f} s | "
        f"{best_interval(best) / 60:.1f} min | {goodput(best):.2%} | {simulated(best, failures=20_000, seed=0):.2%} | "
        f"{hourly:.2%} |"
    )


def failures() -> Iterator[str]:
    yield "| GPUs | between failures | training waits | written in | best interval | goodput | simulated | if hourly |"
    yield "|---|---|---|---|---|---|---|---|"
    for gpus in BIG:
        yield failure_row(gpus)


def tables() -> dict[str, Any]:
    """What stands between the marks of each name, as lines."""
    return {**{name: (lambda name=name: topologies(name)) for name in MODELS}, "large": large, "failures": failures}


def written(text: str, name: str, lines: str) -> str:
    """The page with a table replaced."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    assert text.count(start) == text.count(end) == 1, f"{PAGE}: the marks of {name}"
    before, rest = text.split(start)
    return before + start + lines + rest[rest.index(end) :]


def main() -> int:
    """Writes all tables; with names as arguments, those alone."""
    for name in sys.argv[1:] or tables():
        lines = "\n".join(tables()[name]()) + "\n"
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), name, lines), encoding="utf-8")
        print(f"{PAGE.name}: {name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
