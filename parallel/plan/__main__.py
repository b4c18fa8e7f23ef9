"""Plans a run: every arrangement of ranks it admits, what each takes of a GPU, what it sends, and how fast it is.

The batch, the model and the sequence length are the run's; ranks of each axis, ZeRO's stage, the rows of a microbatch
and activation checkpointing are varied. Nothing is measured here: rates are those of `parallel/plan/hardware.py`.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from configs.schema import ConfigError, load_config
from parallel.plan.hardware import HARDWARE, hardware_named
from parallel.plan.misfit import misfit
from parallel.plan.rank import build_rank
from parallel.plan.search import Planner
from parallel.plan.table import as_values, page
from parallel.plan.world import imagined_world


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parallel.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m parallel.plan configs/griffin_14b.yaml --gpus 512 --gpu-memory 80",
    )
    parser.add_argument("config", help="a run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces one value of the YAML")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU; that of --hardware by default")
    parser.add_argument("--hardware", default="H100", help=f"one of {', '.join(HARDWARE)} (default H100)")
    parser.add_argument("--top", type=int, default=12, metavar="K", help="arrangements shown (default 12)")
    parser.add_argument("--rank", type=int, metavar="R", help="build this rank of the run as it is configured instead")
    parser.add_argument("--json", action="store_true", help="print plain values: bytes, seconds, shares")
    options = parser.parse_intermixed_args(argv)
    if options.gpus < 1 or options.top < 1:
        parser.error("--gpus and --top must be at least 1")
    if options.rank is not None and not 0 <= options.rank < options.gpus:
        parser.error(f"--rank: {options.rank}; must be among the ranks of the job, 0 to {options.gpus - 1}")
    try:
        machine = hardware_named(options.hardware, options.gpu_memory)
        run = load_config(options.config, options.overrides)
        with imagined_world(options.gpus, options.rank or 0):
            planner = Planner(run, machine)
            if options.rank is not None:
                plan = build_rank(planner, options.gpus, options.rank)
                print(json.dumps(vars(plan)) if options.json else plan)
                return 0
            fitting, others = planner.ranked(options.gpus)
            if not fitting and not others:
                raise ConfigError(
                    f"--gpus: {options.gpus}; no arrangement gives each rank a whole number of the "
                    f"{run.train.batch_size} rows of train.batch_size; take a number of GPUs that divides it, or "
                    "change the batch"
                )
            if options.json:
                print(json.dumps([as_values(found) for found in fitting[: options.top]]))
            else:
                print(page(run.name, options.gpus, machine, fitting, len(others), options.top))
            if not fitting:
                print(f"python -m parallel.plan: {misfit(others[0], machine)}", file=sys.stderr)
    except ValueError as error:
        print(f"python -m parallel.plan: {error}", file=sys.stderr)
        return 1
    return 0 if fitting else 1


if __name__ == "__main__":
    sys.exit(main())
