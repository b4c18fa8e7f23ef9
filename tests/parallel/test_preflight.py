"""The look at a job's nodes: what is wrong is found, and the right node named."""

import dataclasses
import json
from pathlib import Path

import pytest

from parallel.grid import Grid
from parallel.preflight import Findings, RankReport, check_shared, describe, judge, ring_rounds, run

SOFTWARE = {"torch": "2.13.0", "git revision": "abc"}


def reports(nodes: int, per_node: int = 2) -> list[RankReport]:
    return [
        RankReport(node=f"n{node}", software=dict(SOFTWARE), device="H100", tflops=600.0 + rank)
        for node in range(nodes)
        for rank in range(per_node)
    ]


def ring(nodes: int, speed: float = 40e9) -> dict[tuple[str, str], float]:
    return {pair: speed for one in ring_rounds([f"n{i}" for i in range(nodes)]) for pair in one}


def test_nodes_that_are_alike_pass() -> None:
    assert judge(reports(4), ring(4)) == Findings()
    assert judge(reports(1, per_node=1), {}).ok


def test_software_that_one_node_has_alone_names_it() -> None:
    found = reports(3)
    found[4] = dataclasses.replace(found[4], software=SOFTWARE | {"torch": "2.12.0"})
    assert judge(found, ring(3)).bad == {"n2": ["torch 2.12.0, where 3 of 3 nodes have 2.13.0"]}
    del found[5].software["git revision"]
    assert "git revision missing, where 3 of 3 nodes have abc" in judge(found, ring(3)).bad["n2"]


def test_two_nodes_that_differ_are_both_named_and_neither_blamed() -> None:
    found = reports(2)
    found[2:] = [dataclasses.replace(report, device="A100") for report in found[2:]]
    findings = judge(found, ring(2))
    assert findings.bad == {}
    assert findings.unequal == ["device differs: H100 on n0; A100 on n1"]
    assert not findings.ok


def test_a_slow_device_names_its_node() -> None:
    found = reports(4)
    found[3] = dataclasses.replace(found[3], tflops=300.0)
    assert list(judge(found, ring(4)).bad) == ["n1"]
    found[3] = dataclasses.replace(found[3], tflops=560.0)
    assert judge(found, ring(4)).ok, "healthy devices differ by as much"


def test_a_node_whose_links_are_all_slow_is_named_and_a_single_link_is_not_blamed() -> None:
    links = ring(5)
    links["n1", "n2"] = links["n2", "n3"] = 4e9
    findings = judge(reports(5), links)
    assert list(findings.bad) == ["n2"]
    assert len(findings.bad["n2"]) == 2
    links["n2", "n3"] = 40e9
    findings = judge(reports(5), links)
    assert findings.bad == {}
    assert findings.unequal == ["link between n1 and n2 at 4 GB/s, where the median is 40"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_a_round_holds_each_node_once_and_all_rounds_the_ring(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    rounds = ring_rounds(nodes)
    for one in rounds:
        members = [node for pair in one for node in pair]
        assert len(members) == len(set(members))
    pairs = {frozenset(pair) for one in rounds for pair in one}
    assert pairs == {frozenset((nodes[i], nodes[(i + 1) % count])) for i in range(count)}


def look(grid: Grid, directories: list[str], nodes: list[str]) -> tuple[Findings, list[RankReport], int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", nodes[grid.rank])
        found, links, overall = run(grid, Path(directories[grid.rank]))
    assert overall > 0
    assert nodes[0] in describe(found, links, overall)
    # Two processes on a busy machine may differ in speed by any factor; this looks at all else.
    found = [dataclasses.replace(report, tflops=1.0) for report in found]
    return judge(found, links), found, len(links)


def test_ranks_look_at_each_other(ranks, tmp_path: Path) -> None:
    shared = str(tmp_path / "shared")
    for findings, found, num_links in ranks(2).run(look, directories=[shared] * 2, nodes=["n0", "n1"]):
        assert findings.ok, findings
        assert [report.node for report in found] == ["n0", "n1"]
        assert num_links == 1
    assert list((tmp_path / "shared").iterdir()) == [], "the check leaves its files behind"


def test_a_directory_that_is_not_shared_names_the_node(ranks, tmp_path: Path) -> None:
    directories = [str(tmp_path / "here"), str(tmp_path / "elsewhere")]
    for findings, _, _ in ranks(2).run(look, directories=directories, nodes=["n0", "n1"]):
        assert list(findings.bad) == ["n1"]
        assert "a file system that all nodes share" in findings.bad["n1"][0]


def shared(grid: Grid, directory: str) -> str | None:
    return check_shared(grid, Path(directory), "n")


def test_a_directory_that_cannot_be_written_to_is_said(ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for problem in ranks(2).run(shared, directory=str(tmp_path / "file" / "below")):
        assert problem is not None
        assert "cannot be written to" in problem


def test_the_command_reports_and_exits(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "parallel.preflight", "--directory", str(tmp_path), "--report"]
    done = subprocess.run([*command, str(tmp_path / "found.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "TFLOP/s" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bad"] == {}
    assert found["ranks"][0]["software"]["torch"].startswith("2.")
