"""How fast the nodes of a job talk, a pair at a time, and which pair does not come through."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from parallel.axes import Axis, make_groups
from parallel.grid import Grid
from parallel.preflight.meeting import Meeting
from parallel.preflight.speed import all_reduce_speed

Nodes = tuple[str, ...]
"""One node, whose own ranks talk, or two neighbours."""


@dataclass
class Links:
    """What was measured.

    Attributes:
        speeds: bandwidth of pairs of nodes, in bytes a second; on the first rank.
        overall: of an all-reduce over all ranks.
        problem: what kept this rank from an all-reduce; None: nothing.
        complete: whether this rank, and before the last measurement all, came through.
    """

    speeds: dict[tuple[str, str], float] = field(default_factory=dict)
    overall: float = float("inf")
    problem: str | None = None
    complete: bool = True


def measure_links(grid: Grid, meeting: Meeting, ranks: Mapping[str, Sequence[int]]) -> Links:
    """Each node by itself, then with its neighbours in a ring of all nodes, in rounds in which no node stands twice,
    then all. Ends with the first round that not all come through. Collective.

    Args:
        ranks: by node.
    """
    links, nodes = Links(), sorted(ranks)
    alone: list[Nodes] = [(node,) for node in nodes if len(ranks[node]) > 1]
    for i, together in enumerate([alone, *ring_rounds(nodes)]):
        members = {names: tuple(sorted(rank for name in names for rank in ranks[name])) for names in together}
        make_groups(members.values())
        mine = next((names for names in together if grid.rank in members[names]), None)
        speed = None if mine is None else _attempt(links, grid, members[mine], _in_words(mine), meeting)
        words = meeting.gather(f"round_{i}", (mine, speed, links.problem))
        links.complete = meeting.hear(f"after_{i}", words is not None and all(word and not word[2] for word in words))
        if not links.complete:
            return links
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for names, measured, _ in words or ():
            if names is not None and len(names) == 2:
                found[names[0], names[1]].append(measured)
        links.speeds |= {pair: min(values) for pair, values in found.items()}
    everyone = tuple(range(grid.world_size))
    links.overall = _attempt(links, grid, everyone, "all-reduce over all ranks", meeting) or 0.0
    return links


def _in_words(names: Nodes) -> str:
    return f"link between {names[0]} and {names[1]}" if len(names) == 2 else "all-reduce among the node's own ranks"


def _attempt(links: Links, grid: Grid, members: tuple[int, ...], what: str, meeting: Meeting) -> float | None:
    """Bytes a second of an all-reduce; None where it fails, and why in `links.problem`."""
    axis, limit = Axis("link", members.index(grid.rank), members), meeting.timeout.total_seconds() / 2
    speed, problem = attempted(lambda: _speed(axis, grid.device), limit)
    if problem is not None:
        links.problem, links.complete = f"{what}: {problem}", False
    return speed


def _speed(axis: Axis, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    return all_reduce_speed(axis, device)


def attempted(action: Callable[[], float], seconds: float) -> tuple[float | None, str | None]:
    """What `action` returns, or what kept it: an error, or nothing that it said within so many seconds.

    It is left to itself in a thread then: a collective whose peer is gone may never return.
    """
    results: list[float] = []
    errors: list[str] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0], None
    silence = f"nothing came through in {seconds:.0f} s; NCCL_DEBUG=INFO says where it waits"
    return None, errors[0] if errors else silence


def ring_rounds(nodes: Sequence[str]) -> list[list[Nodes]]:
    """The pairs of neighbours in a ring, in rounds of disjoint ones."""
    if len(nodes) < 2:
        return []
    pairs: list[Nodes] = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    if len(nodes) == 2:
        return [pairs[:1]]
    rounds = [pairs[:-1:2], pairs[1:-1:2], pairs[-1:]]
    return [one for one in rounds if one]
