"""Looks a job's nodes over before hours are spent on them, and names the bad one.

srun --ntasks-per-node=1 torchrun --nnodes 8 --nproc-per-node 8 ... -m parallel.preflight --directory runs/NAME
torchrun --nproc-per-node 2 -m parallel.preflight --directory runs/NAME        one machine

Every node must have the same software, write to and see the same directory, compute as fast as the others and talk to
its neighbours as fast as they do. Exit status 0: all do; 1: what is wrong, by node.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from parallel.axes import Axis, make_groups
from parallel.grid import Grid, init_distributed
from parallel.speed import all_reduce_speed, matmul_speed
from training.environment import describe_environment

SLOW_COMPUTE = 0.7
"""Of the median rank's matrix products per second: below, the rank's device is called slow. Clocks of healthy GPUs of a
kind differ by a few per cent."""

SLOW_LINK = 0.5
"""Of the median pair's bandwidth: below, the link is. Pairs under one switch and across two differ by less."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank found.

    Attributes:
        node: the machine.
        software: versions, by name, that must be equal on all nodes.
        device: what it computes on.
        tflops: of a matrix product, in 10^12 FLOP/s.
        shared: what is wrong with the shared directory, seen from here; None: nothing.
    """

    node: str
    software: dict[str, str]
    device: str
    tflops: float
    shared: str | None = None


@dataclass
class Findings:
    """What is wrong: of single nodes, which a scheduler may leave out, and between nodes, which it cannot mend."""

    bad: dict[str, list[str]] = field(default_factory=dict)
    unequal: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.bad and not self.unequal

    def blame(self, node: str, problem: str) -> None:
        problems = self.bad.setdefault(node, [])
        if problem not in problems:
            problems.append(problem)


def judge(reports: Sequence[RankReport], links: Mapping[tuple[str, str], float]) -> Findings:
    """What is wrong, from what all ranks found.

    Args:
        links: bandwidth of the pairs of nodes that were measured, in bytes a second.
    """
    findings = Findings()
    for report in reports:
        if report.shared:
            findings.blame(report.node, report.shared)
    for name in dict.fromkeys(name for report in reports for name in (*report.software, "device")):
        _judge_equal(name, reports, findings)
    typical = median(report.tflops for report in reports)
    for report in reports:
        if report.tflops < SLOW_COMPUTE * typical:
            said = f"a device at {report.tflops:.3g} TFLOP/s, where the median is {typical:.3g}"
            findings.blame(report.node, said)
    _judge_links(links, findings)
    return findings


def _judge_equal(name: str, reports: Sequence[RankReport], findings: Findings) -> None:
    """A value that few nodes have is wrong there; where no majority has one, between them."""
    nodes: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        nodes[report.device if name == "device" else report.software.get(name, "missing")].add(report.node)
    if len(nodes) == 1:
        return
    ranked = sorted(nodes, key=lambda value: -len(nodes[value]))
    usual, total = ranked[0], len({report.node for report in reports})
    if 2 * len(nodes[usual]) <= total:
        listed = "; ".join(f"{value} on {', '.join(sorted(nodes[value]))}" for value in ranked)
        findings.unequal.append(f"{name} differs: {listed}")
        return
    for value in ranked[1:]:
        for node in nodes[value]:
            findings.blame(node, f"{name} {value}, where {len(nodes[usual])} of {total} nodes have {usual}")


def _judge_links(links: Mapping[tuple[str, str], float], findings: Findings) -> None:
    """A node is bad if all its links are slow; a slow link between others is said as it is."""
    if len(links) < 2:
        return
    typical = median(links.values())
    slow = [pair for pair, speed in links.items() if speed < SLOW_LINK * typical]
    count, slow_count = (Counter(node for pair in pairs for node in pair) for pairs in (links, slow))
    for pair in sorted(slow):
        said = f"{links[pair] / 1e9:.3g} GB/s, where the median is {typical / 1e9:.3g}"
        culprits = [node for node in pair if slow_count[node] == count[node]]
        for node in culprits:
            findings.blame(node, f"link between {pair[0]} and {pair[1]} at {said}")
        if not culprits:
            findings.unequal.append(f"link between {pair[0]} and {pair[1]} at {said}")


def run(grid: Grid, directory: Path) -> tuple[list[RankReport], dict[tuple[str, str], float], float]:
    """Measures. Collective.

    Returns:
        All ranks' reports, the bandwidth of neighbouring nodes, and of an all-reduce over all ranks, in bytes a second.
    """
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    environment = describe_environment({})
    software = {"python": platform.python_version(), "cuda": str(environment["cuda"])}
    software |= {name: str(found) for name, found in environment["packages"].items()}
    software["git revision"] = str(environment["git_revision"])
    software["uncommitted changes"] = _digest(environment["git_diff"])
    report = RankReport(
        node=node,
        software=software,
        device=environment["device"],
        tflops=matmul_speed(grid.device) / 1e12,
        shared=check_shared(grid, directory, node),
    )
    gathered: list[Any] = [None] * grid.world_size
    dist.all_gather_object(gathered, report)
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, other in enumerate(gathered):
        ranks[other.node].append(rank)
    links = dict(_measure_links(grid, ranks))
    return gathered, links, all_reduce_speed(Axis("world", grid.rank, tuple(range(grid.world_size))), grid.device)


def _digest(text: str | None) -> str:
    return "none" if not text else hashlib.sha256(text.encode()).hexdigest()[:12]


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


def check_shared(grid: Grid, directory: Path, node: str) -> str | None:
    """What is wrong with the directory from this rank's node; None if nothing is. Collective.

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
    return grid.broadcast(problems)[grid.rank]


def describe(reports: Sequence[RankReport], links: Mapping[tuple[str, str], float], overall: float) -> str:
    """The measurements as a table, a node a line."""
    lines = ["node                  ranks   device                          TFLOP/s   GB/s to its neighbours"]
    for node in dict.fromkeys(report.node for report in reports):
        own = [report for report in reports if report.node == node]
        near = ((set(pair) - {node}, speed) for pair, speed in links.items() if node in pair)
        speeds = ", ".join(f"{other}: {speed / 1e9:.3g}" for (other,), speed in near)
        slowest = min(report.tflops for report in own)
        lines.append(f"{node:<20}  {len(own):>5}   {own[0].device[:30]:<30}  {slowest:>7.3g}   {speeds}")
    if len(reports) > 1:
        lines.append(f"all-reduce over {len(reports)} ranks: {overall / 1e9:.3g} GB/s")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parallel.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, metavar="DIR", help="that all nodes must share")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the findings there as JSON")
    parser.add_argument("--timeout-minutes", type=float, default=5.0, metavar="N", help="for any rank to answer (5)")
    options = parser.parse_args(argv)
    grid = init_distributed(options.timeout_minutes)
    reports, links, overall = run(grid, options.directory)
    findings = judge(reports, links)
    if grid.is_lead:
        print(describe(reports, links, overall))
        for node, problems in findings.bad.items():
            print(f"preflight: {node}: {'; '.join(problems)}; leave the node out or repair it", file=sys.stderr)
        for problem in findings.unequal:
            print(f"preflight: {problem}; make the nodes alike", file=sys.stderr)
        if options.report is not None:
            options.report.parent.mkdir(parents=True, exist_ok=True)
            content = dataclasses.asdict(findings) | {"ranks": [dataclasses.asdict(report) for report in reports]}
            options.report.write_text(json.dumps(content, indent=1), encoding="utf-8")
    grid.close()
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
