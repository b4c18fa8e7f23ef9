"""Looks a job's nodes over before hours are spent on them, and names the bad one.

srun --ntasks-per-node=1 torchrun --nnodes 8 --nproc-per-node 8 ... -m parallel.preflight --directory runs
torchrun --nproc-per-node 2 -m parallel.preflight --directory runs                  one machine

First every rank looks at its own node and leaves word in torchrun's store, which needs no GPU: a node without its
GPUs, or whose ranks do not answer, is named, where a process group would wait for it in vain. Then all ranks join:
every node must write to and see the same directory, and talk to its neighbours as fast as others do; who does not come
through an all-reduce in half of the timeout says so in the store, and the pair is named. What most nodes
have wrong is laid to what was asked of them, not to the nodes. Exit status 0: nothing is wrong; 1: what is wrong, by
node.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from parallel.preflight.findings import Findings, RankReport
from parallel.preflight.look import look_over


def tell(findings: Findings, reports: Sequence[RankReport], report: Path | None) -> None:
    """Says what is wrong, and writes it as JSON."""
    for node, problems in findings.bad.items():
        print(f"preflight: {node}: {'; '.join(problems)}; leave the node out or repair it", file=sys.stderr)
    for problem in findings.unequal:
        print(f"preflight: {problem}; make the nodes alike", file=sys.stderr)
    for problem in findings.asked:
        print(f"preflight: {problem}", file=sys.stderr)
    if report is None:
        return
    content = dataclasses.asdict(findings) | {"ranks": [dataclasses.asdict(one) for one in reports]}
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:  # as where the directory is what is wrong
        print(f"preflight: {report}: cannot be written ({error.strerror}); the findings stand above", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parallel.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, metavar="DIR", help="that all nodes must share")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the findings there as JSON")
    parser.add_argument("--timeout-minutes", type=float, default=5.0, metavar="N", help="for any rank to answer (5)")
    parser.add_argument("--cpu", action="store_true", help="ranks are meant to compute on CPUs")
    least = "between neighbouring nodes, all-reduce; 0 (default): half of the median alone"
    parser.add_argument("--least-bandwidth", type=float, default=0.0, metavar="GB/S", help=least)
    options = parser.parse_args(argv)
    # A collective that fails is to be told, by whoever waits for it, not to end the process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    findings = look_over(
        options.directory,
        options.timeout_minutes,
        partial(tell, report=options.report),
        cpu=options.cpu,
        least=1e9 * options.least_bandwidth,
    )
    return 0 if findings.ok else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a collective that never returns holds its thread, and would hold the interpreter's end
