"""The look at a job's nodes: what is wrong is found, and the right node named."""

import dataclasses
import json
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import preflight
from parallel.findings import Findings, RankReport, absent, describe, judge
from parallel.grid import Grid
from parallel.preflight import check_shared, exchange, look_at_own, main, ring_rounds, run, tell

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


def test_what_most_nodes_have_wrong_is_laid_to_none_of_them() -> None:
    """All left out, the next ones would be found alike."""
    found = [dataclasses.replace(report, problem="no GPU answers") for report in reports(3)]
    assert judge(found, {}) == Findings(asked=["no GPU answers (on n0, n1, n2: 3 of 3 nodes)"])
    found[:2] = reports(1)
    assert judge(found, {}) == Findings(asked=["no GPU answers (on n1, n2: 2 of 3 nodes)"])
    found[2:4] = reports(2)[2:]
    assert judge(found, {}) == Findings(bad={"n2": ["no GPU answers"]})
    assert list(judge(found[2:], {}).bad) == ["n2"], "one of two"
    assert list(judge(found[4:], {}).bad) == ["n2"], "another node may be better"


def test_a_directory_that_one_node_alone_has_is_no_shared_one() -> None:
    local = "runs is not the first rank's"
    for nodes in (2, 4):
        found = [*reports(1), *(dataclasses.replace(report, directory=local) for report in reports(nodes)[2:])]
        findings = judge(found, ring(nodes))
        assert findings.bad == {}
        assert [problem.startswith(local) for problem in findings.asked] == [True]
    assert judge([dataclasses.replace(report, directory="runs: no") for report in reports(1)], {}).asked
    found = reports(4)
    found[3] = dataclasses.replace(found[3], directory=local)
    assert judge(found, ring(4)) == Findings(bad={"n1": [local]})


def test_what_was_asked_of_nodes_is_blamed_on_none() -> None:
    found = [dataclasses.replace(report, asked="9 ranks, 8 GPUs") for report in reports(1)]
    assert judge(found, {}) == Findings(asked=["9 ranks, 8 GPUs"])


def test_speeds_of_cpus_are_not_judged() -> None:
    found = [dataclasses.replace(report, device="cpu, 1 threads a rank") for report in reports(4)]
    found[3] = dataclasses.replace(found[3], tflops=1.0)
    assert judge(found, ring(4) | {("n1", "n2"): 1.0}).ok


def test_a_node_that_does_not_answer_is_named() -> None:
    nodes = ["n0", "n1", "n2"]
    found = reports(3)
    assert absent(found, 6, nodes).ok
    assert absent(found[:-1], 6, nodes).bad == {"n2": ["1 of its 2 ranks did not answer"]}
    assert absent(found[2:], 6, nodes).bad == {"n0": ["2 of its 2 ranks did not answer"]}
    assert absent(found[2:], 6, []).unequal == ["2 of 6 ranks did not answer; others did on n1, n2"]
    assert absent(found[:2], 6, nodes) == Findings(asked=["2 of its 2 ranks did not answer (on n1, n2: 2 of 3 nodes)"])


def test_the_first_rank_waits_once_for_those_that_never_answer() -> None:
    store, (one, other) = dist.HashStore(), reports(2, per_node=1)
    assert exchange(store, 2, 4, other, timedelta(seconds=1)) is None
    start = time.monotonic()
    assert exchange(store, 0, 4, one, timedelta(seconds=1)) == [one, other]
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("given", "seen", "ranks", "said"),
    [
        ("8", 7, "8", "torch sees 7 GPUs, where Slurm gave 8"),
        ("8", 0, "1", "torch sees 0 GPUs, where Slurm gave 8"),
        (None, 4, "8", "torch sees 4 GPUs, where 8 ranks need one each"),
        ("7", 8, "7", None),
    ],
)
def test_a_missing_gpu_is_found_before_the_ranks_join(
    given: str | None, seen: int, ranks: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if given is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", given)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(preflight, "matmul_speed", lambda device: 1e12)
    assert look_at_own().problem == said


def test_more_ranks_than_gpus_asked_for_are_no_fault_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    own = look_at_own()
    assert own.problem is None
    assert str(own.asked).startswith("Slurm gave 4 GPUs a node, where 8 ranks need one each; start at most 4")


def test_a_device_that_fails_or_is_in_use_is_a_problem_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(device: torch.device) -> float:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(preflight, "matmul_speed", fail)
    report = tmp_path / "found.json"
    assert main(["--directory", str(tmp_path), "--report", str(report)]) == 1
    assert json.loads(report.read_text())["bad"] == {"n7": ["cpu: CUDA error: uncorrectable ECC error encountered"]}
    assert "n7: cpu: CUDA error: uncorrectable ECC error encountered; leave the node out" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30e9, 80e9))
    assert preflight._occupied(torch.device("cpu")) is None
    said = "cuda:0 has 30 of 80 GB free: another process holds the rest"
    assert preflight._occupied(torch.device("cuda", 0)) == said


def look(grid: Grid, directories: list[str], nodes: list[str]) -> tuple[list[str | None], dict[tuple[str, str], float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", nodes[grid.rank])
        problems, links, overall = run(grid, Path(directories[grid.rank]))
        own = look_at_own()
    assert overall > 0
    table = describe([dataclasses.replace(own, node=node) for node in nodes], links, overall)
    assert [line.split()[0] for line in table.split("\n")[1:-1]] == list(dict.fromkeys(nodes))
    return problems, links


def test_ranks_look_at_each_other(ranks, tmp_path: Path) -> None:
    shared = str(tmp_path / "shared")
    for problems, links in ranks(2).run(look, directories=[shared] * 2, nodes=["n0", "n1"]):
        assert problems == [None, None]
        assert list(links) == [("n0", "n1")]
    assert list((tmp_path / "shared").iterdir()) == [], "the check leaves its files behind"


@pytest.mark.slow
@pytest.mark.parametrize(
    "nodes", [["n0", "n1", "n2"], ["n2", "n0", "n1"], ["n0", "n0", "n1", "n2"], ["n0", "n1", "n2", "n3"]]
)
def test_links_of_a_ring_are_measured(ranks, tmp_path: Path, nodes: list[str]) -> None:
    """Ranks make each round's groups in one order, also those of a node that sits the round out."""
    directories = [str(tmp_path)] * len(nodes)
    for _, links in ranks(len(nodes)).run(look, directories=directories, nodes=nodes):
        names = sorted(set(nodes))
        pairs = zip(names, [*names[1:], names[0]], strict=True)
        assert {frozenset(pair) for pair in links} == {frozenset(pair) for pair in pairs}
        assert all(speed > 0 for speed in links.values())


def test_a_directory_that_is_not_shared_names_the_node(ranks, tmp_path: Path) -> None:
    directories = [str(tmp_path / "here"), str(tmp_path / "elsewhere")]
    for problems, _ in ranks(2).run(look, directories=directories, nodes=["n0", "n1"]):
        assert problems[0] is None
        assert "a file system that all nodes share" in str(problems[1])


def shared(grid: Grid, directory: str) -> list[str | None]:
    return check_shared(grid, Path(directory), "n")


def test_a_directory_that_cannot_be_written_to_is_said(ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for problems in ranks(2).run(shared, directory=str(tmp_path / "file" / "below")):
        assert all("cannot be written to" in str(problem) for problem in problems)


def test_findings_are_said_where_no_report_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    tell(Findings(asked=["runs cannot be written to"]), reports(1), tmp_path / "file" / "report.json")
    said = capsys.readouterr().err
    assert "preflight: runs cannot be written to\n" in said
    assert "report.json: cannot be written (" in said


def test_the_command_reports_and_exits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "parallel.preflight", "--directory", str(tmp_path), "--report"]
    done = subprocess.run([*command, str(tmp_path / "found.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "TFLOP/s" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bad"] == {}
    assert found["ranks"][0]["software"]["torch"].startswith("2.")
