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

from parallel.axes import Axis
from parallel.grid import Grid
from parallel.preflight import look as looking
from parallel.preflight.__main__ import main, tell
from parallel.preflight.findings import Findings, RankReport, absent, describe, judge
from parallel.preflight.links import Links, ring_rounds
from parallel.preflight.look import check_shared, look_at_others, look_at_own
from parallel.preflight.meeting import Meeting
from training.supervise import supervise

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
        found = [*reports(1), *(dataclasses.replace(report, asked=local) for report in reports(nodes)[2:])]
        findings = judge(found, ring(nodes))
        assert findings.bad == {}
        assert [problem.startswith(local) for problem in findings.asked] == [True]
    assert judge([dataclasses.replace(report, asked="runs: no") for report in reports(1)], {}).asked
    found = reports(4)
    found[3] = dataclasses.replace(found[3], asked=local)
    assert judge(found, ring(4)) == Findings(bad={"n1": [local]})


@pytest.mark.parametrize("cannot", [range(2, 8), range(8)], ids=["a directory of the first node's", "too many ranks"])
def test_a_fault_of_the_user_s_ends_the_job(cannot: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = reports(4)
    for rank in cannot:
        found[rank] = dataclasses.replace(found[rank], asked="cannot be")
    report = tmp_path / "report.json"
    tell(judge(found, ring(4)), found, report)
    decision = supervise(tmp_path / "run", 0.0, report, 5, lambda *command: "")
    assert (decision.answer, decision.exclude) == ("failed", ())
    assert decision.why.startswith("pre-flight: cannot be (on n")


def test_what_was_asked_of_nodes_is_blamed_on_none() -> None:
    found = [dataclasses.replace(report, asked="9 ranks, 8 GPUs") for report in reports(1)]
    assert judge(found, {}) == Findings(asked=["9 ranks, 8 GPUs (on n0: 1 of 1 nodes)"])


def test_speeds_of_cpus_are_not_judged() -> None:
    found = [dataclasses.replace(report, device="cpu, 1 threads a rank") for report in reports(4)]
    found[3] = dataclasses.replace(found[3], tflops=1.0)
    assert judge(found, ring(4) | {("n1", "n2"): 1.0}).ok
    assert not judge(found, ring(4) | {("n1", "n2"): 1.0}, least_bandwidth=2.0).ok, "but what was asked for is"


def test_a_link_slower_than_asked_for_is_found_where_there_is_none_to_compare_it_with() -> None:
    assert judge(reports(2), ring(2, speed=1e9)).ok
    said = "link between n0 and n1 at 1 GB/s, where the median is 1, and at least 20 is asked for"
    assert judge(reports(2), ring(2, speed=1e9), 20e9).asked == [f"{said} (on n0, n1: 2 of 2 nodes)"]
    assert judge(reports(2), ring(2), 20e9).ok
    assert len(judge(reports(3), ring(3, speed=1e9), 20e9).asked) == 3, "the network's, not the nodes'"


def test_a_node_that_does_not_answer_is_named() -> None:
    nodes = ["n0", "n1", "n2"]
    found = reports(3)
    assert absent(found, 6, nodes).ok
    assert absent(found[:-1], 6, nodes).bad == {"n2": ["1 of its 2 ranks did not answer"]}
    assert absent(found[2:], 6, nodes).bad == {"n0": ["2 of its 2 ranks did not answer"]}
    assert absent(found[2:], 6, []).unequal == ["2 of 6 ranks did not answer; others did on n1, n2"]
    assert absent(found[:2], 6, nodes) == Findings(asked=["2 of its 2 ranks did not answer (on n1, n2: 2 of 3 nodes)"])


def test_the_first_rank_waits_once_for_those_that_never_answer() -> None:
    store = dist.HashStore()
    first, third = (Meeting(store, rank, 4, timedelta(seconds=1)) for rank in (0, 2))
    assert third.gather("own", {"node": "n2"}) is None
    start = time.monotonic()
    assert first.gather("own", "here") == ["here", None, {"node": "n2"}, None]
    assert time.monotonic() - start < 10
    assert [one.hear("found", value) for one, value in ((first, [1]), (third, "not looked at"))] == [[1], [1]]


def be_node(monkeypatch: pytest.MonkeyPatch, given: str | None, seen: int, ranks: str) -> None:
    """Slurm gave so many GPUs or said nothing, torch sees so many, for so many ranks."""
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if given is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", given)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(looking, "matmul_speed", lambda device: 1e12)


@pytest.mark.parametrize(
    ("given", "seen", "ranks", "said"),
    [
        ("8", 7, "8", "torch sees 7 GPUs, where Slurm gave 8"),
        ("8", 0, "1", "torch sees 0 GPUs, where Slurm gave 8"),
        ("7", 8, "7", None),
    ],
)
def test_a_missing_gpu_is_found_before_the_ranks_join(
    given: str, seen: int, ranks: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_node(monkeypatch, given, seen, ranks)
    assert look_at_own().problem == said


@pytest.mark.parametrize(
    ("given", "seen", "ranks", "said"),
    [
        ("4", 4, "8", "Slurm gave 4 GPUs, where 8 ranks need one each; start fewer"),
        ("4", 8, "8", "Slurm gave 4 GPUs, where 8 ranks need one each; start fewer"),
        (None, 4, "8", "torch sees 4 GPUs, where 8 ranks need one each; start fewer"),
        (None, 0, "1", "torch sees no GPU; ask for GPUs (sbatch --gpus-per-node)"),
        (None, 8, "1", "torch sees 8 GPUs, and 7 would idle; start 8 ranks"),
        ("8", 8, "4", None),
        ("4", 8, "4", None),
    ],
)
def test_ranks_that_do_not_fit_the_gpus_are_no_fault_of_the_node(
    given: str | None, seen: int, ranks: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_node(monkeypatch, given, seen, ranks)
    own = look_at_own()
    assert own.problem is None
    assert str(own.asked).startswith(str(said))
    assert (look_at_own(cpu=True).asked is None) == (said is None or seen == 0)


def test_a_device_that_fails_or_is_in_use_is_a_problem_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(device: torch.device) -> float:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(looking, "matmul_speed", fail)
    report = tmp_path / "found.json"
    assert main(["--directory", str(tmp_path), "--report", str(report), "--cpu"]) == 1
    assert json.loads(report.read_text())["bad"] == {"n7": ["cpu: CUDA error: uncorrectable ECC error encountered"]}
    assert "n7: cpu: CUDA error: uncorrectable ECC error encountered; leave the node out" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30e9, 80e9))
    assert looking._occupied(torch.device("cpu")) is None
    said = "cuda:0 has 30 of 80 GB free: another process holds the rest"
    assert looking._occupied(torch.device("cuda", 0)) == said


def report_of(node: str) -> RankReport:
    return dataclasses.replace(look_at_own(cpu=True), node=node)


def look(grid: Grid, directories: list[str], nodes: list[str], seconds: float = 60.0) -> tuple[RankReport, Links]:
    names = dist.PrefixStore(directories[0], dist.distributed_c10d._get_default_store())
    meeting = Meeting(names, grid.rank, grid.world_size, timedelta(seconds=seconds))
    return look_at_others(grid, meeting, Path(directories[grid.rank]), report_of(nodes[grid.rank]))


def test_ranks_look_at_each_other(ranks, tmp_path: Path) -> None:
    shared, nodes = str(tmp_path / "shared"), ["n0", "n1"]
    found = ranks(2).run(look, directories=[shared] * 2, nodes=nodes)
    assert [(own.problem, own.asked, links.complete) for own, links in found] == [(None, None, True)] * 2
    links = found[0][1]
    assert list(links.speeds) == [("n0", "n1")]
    assert links.overall > 0
    table = describe([own for own, _ in found], links.speeds, links.overall)
    assert [line.split()[0] for line in table.split("\n")[1:-1]] == nodes
    assert list((tmp_path / "shared").iterdir()) == [], "the check leaves its files behind"


@pytest.mark.slow
@pytest.mark.parametrize(
    "nodes", [["n0", "n1", "n2"], ["n2", "n0", "n1"], ["n0", "n0", "n1", "n2"], ["n0", "n1", "n2", "n3"]]
)
def test_links_of_a_ring_are_measured(ranks, tmp_path: Path, nodes: list[str]) -> None:
    """Ranks make each round's groups in one order, also those of a node that sits the round out."""
    directories = [str(tmp_path)] * len(nodes)
    found = ranks(len(nodes)).run(look, directories=directories, nodes=nodes)
    assert all(links.complete for _, links in found)
    names = sorted(set(nodes))
    pairs = zip(names, [*names[1:], names[0]], strict=True)
    speeds = found[0][1].speeds
    assert {frozenset(pair) for pair in speeds} == {frozenset(pair) for pair in pairs}
    assert all(speed > 0 for speed in speeds.values())


def cut_off(grid: Grid, directory: str, nodes: list[str]) -> tuple[RankReport, Links]:
    """The link between the last two nodes hangs on one side, and fails on the other."""

    def speed(axis: Axis, device: torch.device) -> float:
        if axis.ranks == tuple(range(grid.world_size))[-2:]:
            if grid.rank == grid.world_size - 1:
                raise RuntimeError("NCCL error: unhandled system error\nmore")
            time.sleep(60)
        return 1e9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.preflight.links.all_reduce_speed", speed)
        return look(grid, [directory] * grid.world_size, nodes, seconds=4.0)


def test_a_link_that_nothing_comes_through_is_named(ranks, tmp_path: Path) -> None:
    found = ranks(2).run(cut_off, directory=str(tmp_path), nodes=["n0", "n1"])
    link = "link between n0 and n1: "
    assert [own.problem for own, _ in found] == [
        f"{link}nothing came through in 2 s; NCCL_DEBUG=INFO says where it waits",
        f"{link}RuntimeError: NCCL error: unhandled system error",
    ]
    assert not any(links.complete for _, links in found)
    assert all(link in problem for problem in judge([own for own, _ in found], {}).asked)


@pytest.mark.slow
def test_a_link_that_nothing_comes_through_ends_its_round(ranks, tmp_path: Path) -> None:
    """Its nodes are left out; the others, which wait for nothing that does not come, are not."""
    found = ranks(4).run(cut_off, directory=str(tmp_path), nodes=["n0", "n1", "n2", "n3"])
    assert [own.problem is None for own, _ in found] == [True, True, False, False]
    assert list(judge([own for own, _ in found], found[0][1].speeds).bad) == ["n2", "n3"]
    assert not any(links.complete for _, links in found)


def test_ranks_that_do_not_join_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(timeout_minutes: float) -> Grid:
        raise RuntimeError("Gloo connectFullMesh failed with timeout\nmore")

    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(looking, "init_distributed", fail)
    report = tmp_path / "found.json"
    assert main(["--directory", str(tmp_path), "--report", str(report), "--cpu"]) == 1
    said = "no process group with the others: Gloo connectFullMesh failed with timeout"
    assert json.loads(report.read_text())["bad"] == {"n7": [said]}


def test_a_directory_that_is_not_shared_names_the_node(ranks, tmp_path: Path) -> None:
    directories = [str(tmp_path / "here"), str(tmp_path / "elsewhere")]
    one, other = (own for own, _ in ranks(2).run(look, directories=directories, nodes=["n0", "n1"]))
    assert one.asked is None
    assert "a file system that all nodes share" in str(other.asked)


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
    command = [sys.executable, "-m", "parallel.preflight", "--directory", str(tmp_path), "--cpu", "--report"]
    done = subprocess.run([*command, str(tmp_path / "found.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "TFLOP/s" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bad"] == {}
    assert found["ranks"][0]["software"]["torch"].startswith("2.")
