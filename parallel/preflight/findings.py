"""What is wrong with a job's nodes, judged from what every rank reports of its own."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

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
        problem: what is wrong with the node, seen from here; None: nothing.
        asked: what was asked of the node that cannot be, as ranks without a GPU or a directory that is not there: laid
            to the node only if few have it; None: nothing.
    """

    node: str
    software: dict[str, str]
    device: str
    tflops: float
    problem: str | None = None
    asked: str | None = None


@dataclass
class Findings:
    """What is wrong.

    Attributes:
        bad: of single nodes, which a scheduler may leave out.
        unequal: between nodes, which it cannot mend.
        asked: with what was asked of them, which other nodes would not mend either.
    """

    bad: dict[str, list[str]] = field(default_factory=dict)
    unequal: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.bad and not self.unequal and not self.asked

    def blame(self, node: str, problem: str) -> None:
        problems = self.bad.setdefault(node, [])
        if problem not in problems:
            problems.append(problem)

    def spare(self, nodes: int) -> None:
        """Blames none of `nodes` where most of several are at fault: leaving all of them out would bring others that
        fail alike, until none is left."""
        if nodes > 1 and 2 * len(self.bad) > nodes:
            self.asked += _in_words(self.bad, nodes)
            self.bad = {}


def _in_words(bad: Mapping[str, Sequence[str]], nodes: int) -> list[str]:
    """Each problem once, with the nodes that have it."""
    having: dict[str, list[str]] = defaultdict(list)
    for node, problems in bad.items():
        for problem in problems:
            having[problem].append(node)
    return [
        f"{problem} (on {', '.join(sorted(names))}: {len(names)} of {nodes} nodes)" for problem, names in having.items()
    ]


def judge(
    reports: Sequence[RankReport], links: Mapping[tuple[str, str], float], least_bandwidth: float = 0.0
) -> Findings:
    """What is wrong, from what all ranks found.

    Speeds are compared where ranks have GPUs of their own; on CPUs they share cores with whatever else runs.

    Args:
        links: bandwidth of the pairs of nodes that were measured, in bytes a second.
        least_bandwidth: that a link must have, whatever others have.
    """
    findings, nodes = Findings(), len({report.node for report in reports})
    for report in reports:
        if report.problem:
            findings.blame(report.node, report.problem)
    _judge_asked(reports, nodes, findings)
    for name in dict.fromkeys(name for report in reports for name in (*report.software, "device")):
        _judge_equal(name, reports, findings)
    compared = not any(report.device.startswith("cpu") for report in reports)
    if compared:
        _judge_compute(reports, findings)
    _judge_links(links, findings, SLOW_LINK if compared else 0.0, least_bandwidth)
    findings.spare(nodes)
    return findings


def _judge_asked(reports: Sequence[RankReport], nodes: int, findings: Findings) -> None:
    """A few nodes that cannot do it are at fault; half of them, or all but the first rank's, where it is a directory,
    are not."""
    without: dict[str, list[str]] = {}
    for report in reports:
        if report.asked:
            without.setdefault(report.node, [report.asked])
    if 2 * len(without) >= nodes:
        findings.asked += _in_words(without, nodes)
        return
    for node, (problem,) in without.items():
        findings.blame(node, problem)


def _judge_compute(reports: Sequence[RankReport], findings: Findings) -> None:
    typical = median(report.tflops for report in reports)
    for report in reports:
        if report.tflops < SLOW_COMPUTE * typical:
            said = f"a device at {report.tflops:.3g} TFLOP/s, where the median is {typical:.3g}"
            findings.blame(report.node, said)


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


def _judge_links(links: Mapping[tuple[str, str], float], findings: Findings, of_median: float, least: float) -> None:
    """A node is bad if all its links are slow; a slow link between others is said as it is. One link alone is its own
    median, and is held against `least` only."""
    if not links:
        return
    typical = median(links.values())
    slow = [pair for pair, speed in links.items() if speed < max(least, of_median * typical)]
    count, slow_count = (Counter(node for pair in pairs for node in pair) for pairs in (links, slow))
    for pair in sorted(slow):
        wanted = f", and at least {least / 1e9:.3g} is asked for" if links[pair] < least else ""
        said = f"{links[pair] / 1e9:.3g} GB/s, where the median is {typical / 1e9:.3g}{wanted}"
        culprits = [node for node in pair if slow_count[node] == count[node]]
        for node in culprits:
            findings.blame(node, f"link between {pair[0]} and {pair[1]} at {said}")
        if not culprits:
            findings.unequal.append(f"link between {pair[0]} and {pair[1]} at {said}")


def absent(reports: Sequence[RankReport], size: int, nodes: Sequence[str]) -> Findings:
    """The nodes whose ranks did not answer.

    Args:
        size: ranks that should have.
        nodes: all nodes of the job, where the scheduler tells.
    """
    findings, silent = Findings(), size - len(reports)
    answered = [report.node for report in reports]
    each = size // max(1, len(nodes))
    for node in nodes if silent else ():
        if answered.count(node) < each:
            findings.blame(node, f"{each - answered.count(node)} of its {each} ranks did not answer")
    if silent and not findings.bad:
        findings.unequal.append(
            f"{silent} of {size} ranks did not answer; others did on {', '.join(sorted(set(answered)))}"
        )
    findings.spare(len(nodes))
    return findings


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
