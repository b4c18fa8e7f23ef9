"""Looks a job's nodes over before hours are spent on them, and names the bad one.

srun --ntasks-per-node=1 torchrun --nnodes 8 --nproc-per-node 8 ... -m parallel.preflight --directory runs
torchrun --nproc-per-node 2 -m parallel.preflight --directory runs                  one machine

First every rank looks at its own node and leaves word in torchrun's store, which needs no GPU: a node without its
GPUs, or whose ranks do not answer, is named, where a process group would wait for it in vain. Then all ranks join:
every node must write to and see the same directory, and talk to its neighbours as fast as others do. What most nodes
have wrong is laid to what was asked of them, not to the nodes. Exit status 0: nothing is wrong; 1: what is wrong, by
node.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.axes import Axis, make_groups
from parallel.findings import Findings, RankReport, absent, describe, judge
from parallel.grid import Grid, init_distributed
from parallel.speed import all_reduce_speed, matmul_speed
from training.environment import describe_environment

FREE_MEMORY = 0.9
"""Of a GPU's memory: with less, somebody else's process is still on it."""


def own_node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look_at_own() -> RankReport:
    """What this rank finds without the others: software, device, and how fast that computes."""
    environment = describe_environment({})
    software = {"python": platform.python_version(), "cuda": str(environment["cuda"])}
    software |= {name: str(found) for name, found in environment["packages"].items()}
    software["git revision"] = str(environment["git_revision"])
    software["uncommitted changes"] = _digest(environment["git_diff"])
    report = RankReport(node=own_node(), software=software, device=environment["device"], tflops=0.0)
    problem, asked = _missing_gpus()
    if problem is None and asked is None:
        index = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
        try:
            problem = _occupied(device)
            report = dataclasses.replace(report, tflops=matmul_speed(device) / 1e12)
        except RuntimeError as error:
            problem = f"{device}: {str(error).splitlines()[0]}"
    return dataclasses.replace(report, problem=problem, asked=asked)


def _digest(text: str | None) -> str:
    return "none" if not text else hashlib.sha256(text.encode()).hexdigest()[:12]


def _missing_gpus() -> tuple[str | None, str | None]:
    """What is wrong with the node's GPUs, and with what is asked of them."""
    seen, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if seen < given:
        return f"torch sees {seen} GPUs, where Slurm gave {given}", None
    if 0 < given < ranks:
        way_out = f"start at most {given} (RANKS_PER_NODE, torchrun --nproc-per-node), or ask for {ranks} GPUs"
        return None, f"Slurm gave {given} GPUs a node, where {ranks} ranks need one each; {way_out}"
    if 0 < seen < ranks:
        return f"torch sees {seen} GPUs, where {ranks} ranks need one each", None
    return None, None


def _occupied(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    if free >= FREE_MEMORY * total:
        return None
    return f"{device} has {free / 1e9:.0f} of {total / 1e9:.0f} GB free: another process holds the rest"


def exchange(store: dist.Store, rank: int, size: int, own: RankReport, timeout: timedelta) -> list[RankReport] | None:
    """All ranks' reports on the first rank, None on the others. Collective, over the store alone.

    A rank that does not answer in time is missing from the list.
    """
    store.set(f"report_{rank}", json.dumps(dataclasses.asdict(own)))
    if rank != 0:
        return None
    reports = []
    for other in range(size):
        try:
            store.wait([f"report_{other}"], timeout)
        except RuntimeError:
            timeout = timedelta(seconds=1)  # the others have had theirs
        else:
            reports.append(RankReport(**json.loads(store.get(f"report_{other}"))))
    return reports


def nodes_of_job() -> list[str]:
    """The nodes that Slurm gave the job; none outside of Slurm."""
    if "SLURM_JOB_NODELIST" not in os.environ:
        return []
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def run(grid: Grid, directory: Path) -> tuple[list[str | None], dict[tuple[str, str], float], float]:
    """What takes all ranks together. Collective.

    Returns:
        Each rank's problem with the directory, the bandwidth of neighbouring nodes, and of an all-reduce over all
        ranks, in bytes a second.
    """
    problems = check_shared(grid, directory, own_node())
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, node in enumerate(grid.gather(own_node())):
        ranks[node].append(rank)
    links = dict(_measure_links(grid, ranks))
    return problems, links, all_reduce_speed(Axis("world", grid.rank, tuple(range(grid.world_size))), grid.device)


def _measure_links(grid: Grid, ranks: Mapping[str, Sequence[int]]) -> Iterator[tuple[tuple[str, str], float]]:
    """Each node with its neighbour in a ring of all nodes, in rounds in which no node stands twice."""
    nodes = sorted(ranks)
    for pair in ring_rounds(nodes):
        make_groups(tuple(sorted((*ranks[one], *ranks[other]))) for one, other in pair)
        mine = [both for both in pair if grid.rank in (*ranks[both[0]], *ranks[both[1]])]
        speed = None
        if mine:
            members = tuple(sorted((*ranks[mine[0][0]], *ranks[mine[0][1]])))
            speed = all_reduce_speed(Axis("pair", members.index(grid.rank), members), grid.device)
        speeds: list[Any] = [None] * grid.world_size
        dist.all_gather_object(speeds, (mine[0], speed) if mine else None)
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for entry in speeds:
            if entry is not None:
                found[entry[0]].append(entry[1])
        yield from ((both, min(values)) for both, values in found.items())


def ring_rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The pairs of neighbours in a ring, in rounds of disjoint ones."""
    if len(nodes) < 2:
        return []
    pairs = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    if len(nodes) == 2:
        return [pairs[:1]]
    rounds = [pairs[:-1:2], pairs[1:-1:2], pairs[-1:]]
    return [one for one in rounds if one]


def check_shared(grid: Grid, directory: Path, node: str) -> list[str | None]:
    """What is wrong with the directory from each rank's node; None where nothing is. Collective.

    The first rank writes a word that all must read, every rank one that the first must find.
    """
    word = grid.broadcast(uuid.uuid4().hex)
    folder = directory / f".preflight-{word}"
    problem: str | None = None
    try:
        if grid.is_lead:
            folder.mkdir(parents=True)
            (folder / "lead").write_text(word)
    except OSError as error:
        problem = f"{directory} cannot be written to ({error.strerror}); name a directory on a shared file system"
    dist.barrier()
    try:
        if problem is None and (folder / "lead").read_text() != word:
            problem = f"{directory}: what the first rank wrote reads otherwise here; name a shared file system"
        (folder / f"rank_{grid.rank}").write_text(node)
    except OSError as error:
        problem = problem or (
            f"{directory} is not the first rank's, or cannot be written to ({error.strerror}); name a directory on a "
            "file system that all nodes share"
        )
    problems: list[Any] = [None] * grid.world_size
    dist.all_gather_object(problems, problem)
    if grid.is_lead:
        for rank in range(grid.world_size):
            if problems[rank] is None and not (folder / f"rank_{rank}").exists():
                problems[rank] = f"{directory} is not the one that the first rank sees; name a shared file system"
        shutil.rmtree(folder, ignore_errors=True)
    return grid.broadcast(problems)


def look_over(directory: Path, timeout_minutes: float, tell: Callable[[Findings, list[RankReport]], None]) -> Findings:
    """Measures and judges. Collective.

    Args:
        timeout_minutes: for any rank to answer.
        tell: called on the first rank with the findings and all ranks' reports, before any rank leaves: a launcher
            ends all when one has failed.

    Returns:
        The findings, on all ranks.
    """
    timeout = timedelta(minutes=timeout_minutes)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = dist.HashStore() if size == 1 else next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
    store = dist.PrefixStore("preflight", store)
    reports = exchange(store, rank, size, look_at_own(), timeout)
    if reports is not None:
        alone = absent(reports, size, nodes_of_job()) if len(reports) < size else judge(reports, {})
        if not alone.ok:
            tell(alone, reports)
        store.set("findings", json.dumps(dataclasses.asdict(alone)))
    store.wait(["findings"], 2 * timeout)
    findings = Findings(**json.loads(store.get("findings")))
    if not findings.ok:
        return findings
    grid = init_distributed(timeout_minutes)
    problems, links, overall = run(grid, directory)
    if reports is not None:
        reports = [dataclasses.replace(one, directory=problem) for one, problem in zip(reports, problems, strict=True)]
        findings = judge(reports, links)
        print(describe(reports, links, overall), flush=True)
        tell(findings, reports)
    findings = grid.broadcast(findings)
    grid.close()
    return findings


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
    options = parser.parse_args(argv)
    findings = look_over(options.directory, options.timeout_minutes, partial(tell, report=options.report))
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
