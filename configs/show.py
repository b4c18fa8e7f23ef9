"""A run's YAML as it will be used: `python -m configs.show CONFIG [key.sub=value ...]`.

Prints the whole configuration, defaults and overrides in place, or with --directory the run directory alone; with
--ranks it is refused if it cannot be spread over so many processes, with --check also for all that a start would refuse
it for: how the model divides, corpora, tokenizer, tasks, another run in the directory, the checkpoint to begin with;
and too little memory, where there is a GPU or --hardware names the one that will be. For scripts, before anything is
allocated.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import torch

from configs.schema import RunConfig, dump_config, load_config
from data.loader import check_batch
from parallel.axes import axis_sizes, make_axes
from parallel.grid import Grid
from parallel.plan.hardware import HARDWARE, Hardware, hardware_named


def check_ranks(run: RunConfig, ranks: int) -> dict[str, int]:
    """The sizes of the axes; raises ValueError unless `ranks` processes can share the run's axes and its batch."""
    split = run.parallel
    sizes = axis_sizes(ranks, pipeline=split.pipeline, sequence=split.sequence, tensor=split.tensor)
    check_batch(run.train.batch_size, run.train.micro_batch_size, sizes["data"])
    return sizes


def check_start(run: RunConfig, sizes: dict[str, int], machine: Hardware | None = None) -> None:
    """Raises ValueError where the first rank of a grid of `sizes` would; for want of memory if `machine` is given or a
    GPU at hand."""
    from parallel.plan.fits import refuse_indivisible, refuse_too_large
    from training import start  # takes seconds to import

    ranks = math.prod(sizes.values())
    grid = Grid(rank=0, world_size=ranks, local_rank=0, device=torch.device("cpu"), axes=make_axes(0, sizes))
    refuse_indivisible(run, ranks)
    refuse_too_large(run, ranks, machine)
    start.check_start(run, grid)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m configs.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m configs.show configs/griffin_7b.yaml parallel.tensor=8 --ranks 64",
    )
    parser.add_argument("config", help="a run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces one value of the YAML")
    parser.add_argument("--directory", action="store_true", help="print the run directory alone")
    parser.add_argument("--ranks", type=int, metavar="N", help="check that N processes can share the run")
    parser.add_argument("--check", action="store_true", help="with --ranks: check all that a start does")
    parser.add_argument("--hardware", metavar="NAME", help=f"with --check: the GPUs, one of {', '.join(HARDWARE)}")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one of them, if not what --hardware has")
    options = parser.parse_intermixed_args(argv)
    if options.check and options.ranks is None:
        parser.error("--check: how many processes are to start? give --ranks")
    if options.gpu_memory is not None and options.hardware is None:
        parser.error("--gpu-memory: of which GPU? give --hardware")
    try:
        run = load_config(options.config, options.overrides)
        if options.ranks is not None:
            sizes = check_ranks(run, options.ranks)
            if options.check:
                check_start(
                    run, sizes, hardware_named(options.hardware, options.gpu_memory) if options.hardware else None
                )
    except ValueError as error:
        print(f"configs.show: {error}", file=sys.stderr)
        return 1
    print(run.directory if options.directory else dump_config(run).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
