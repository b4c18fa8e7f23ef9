"""What ranks find out about a job's nodes, each about its own, then all together, judged after each round."""

import dataclasses
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import uuid
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.grid import Grid, init_distributed
from parallel.preflight.findings import Findings, RankReport, absent, describe, judge
from parallel.preflight.links import Links, measure_links
from parallel.preflight.meeting import Meeting
from parallel.preflight.speed import matmul_speed
from training.environment import describe_environment

FREE_MEMORY = 0.9
"""Of a GPU's memory: with less, somebody else's process is still on it."""


def own_node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look_at_own(*, cpu: bool = False) -> RankReport:
    """What this rank finds without the others: software, device, and how fast that computes; on a CPU if `cpu` says
    that it is meant to."""
    environment = describe_environment({})
    software = {"python": platform.python_version(), "cuda": str(environment["cuda"])}
    software |= {name: str(found) for name, found in environment["packages"].items()}
    software["git revision"] = str(environment["git_revision"])
    software["uncommitted changes"] = _digest(environment["git_diff"])
    report = RankReport(node=own_node(), software=software, device=environment["device"], tflops=0.0)
    problem, asked = _missing_gpus(cpu)
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


def _missing_gpus(cpu: bool) -> tuple[str | None, str | None]:
    """What is wrong with the node's GPUs, and with what is asked of them."""
    seen, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if seen < given:
        return f"torch sees {seen} GPUs, where Slurm gave {given}", None
    asked, number = None, "RANKS_PER_NODE, torchrun --nproc-per-node"
    if seen == 0 and not cpu:
        asked = (
            "torch sees no GPU; ask for GPUs (sbatch --gpus-per-node), install a torch that finds them, or ask for "
            "CPUs (ON_CPU=1 for train.sbatch, --cpu here)"
        )
    elif 0 < seen < ranks or 0 < given < ranks:
        gpus = f"Slurm gave {given}" if 0 < given < ranks else f"torch sees {seen}"
        asked = f"{gpus} GPUs, where {ranks} ranks need one each; start fewer ({number}), or ask for more GPUs"
    elif seen > ranks and not given:  # of GPUs that were asked for, to leave some idle is the user's to choose
        asked = (
            f"torch sees {seen} GPUs, and {seen - ranks} would idle; start {seen} ranks ({number}; train.sbatch starts "
            "as many as sbatch --gpus-per-node asks for), or hide the others with CUDA_VISIBLE_DEVICES"
        )
    return None, asked


def _occupied(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    if free >= FREE_MEMORY * total:
        return None
    return f"{device} has {free / 1e9:.0f} of {total / 1e9:.0f} GB free: another process holds the rest"


def nodes_of_job() -> list[str]:
    """The nodes that Slurm gave the job; none outside of Slurm."""
    if "SLURM_JOB_NODELIST" not in os.environ:
        return []
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def look_at_others(grid: Grid, meeting: Meeting, directory: Path, own: RankReport) -> tuple[RankReport, Links]:
    """What takes all ranks together, added to what this one found alone. Collective."""
    asked = check_shared(grid, directory, own.node)[grid.rank]
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, node in enumerate(grid.gather(own.node)):
        ranks[node].append(rank)
    links = measure_links(grid, meeting, ranks)
    return dataclasses.replace(own, asked=asked, problem=links.problem), links


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


Tell = Callable[[Findings, list[RankReport]], None]
"""Called on the first rank with the findings and all ranks' reports."""


def look_over(
    directory: Path, timeout_minutes: float, tell: Tell, *, cpu: bool = False, least: float = 0.0
) -> Findings:
    """Measures and judges. Collective.

    Args:
        timeout_minutes: for any rank to answer.
        tell: before any rank leaves: a launcher ends all when one has failed.
        cpu: ranks are meant to compute on CPUs.
        least: bandwidth between neighbouring nodes, in bytes a second.

    Returns:
        The findings, on all ranks.
    """
    timeout = timedelta(minutes=timeout_minutes)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = dist.HashStore() if size == 1 else next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
    meeting = Meeting(dist.PrefixStore("preflight", store), rank, size, timeout)
    own = look_at_own(cpu=cpu)
    findings = settle("own", own, meeting, tell)
    if not findings.ok:
        return findings
    grid = None
    try:
        grid = init_distributed(timeout_minutes)
    except RuntimeError as error:
        own = dataclasses.replace(own, problem=f"no process group with the others: {str(error).splitlines()[0]}")
    findings = settle("joined", own, meeting, tell)
    if grid is None or not findings.ok:
        return findings
    own, links = look_at_others(grid, meeting, directory, own)
    findings = settle("others", own, meeting, tell, links, least)
    if findings.ok:  # otherwise some rank may wait in a collective for ever
        grid.close()
    return findings


def settle(
    name: str, own: RankReport, meeting: Meeting, tell: Tell, links: Links | None = None, least: float = 0.0
) -> Findings:
    """Judges what all ranks have found so far, and tells it where something is wrong. Collective.

    Args:
        links: once the ranks have talked; then it is told in any case.
    """
    words = meeting.gather(name, dataclasses.asdict(own))
    findings = Findings()
    if words is not None:
        reports = [RankReport(**word) for word in words if word is not None]
        if len(reports) < meeting.size:
            findings = absent(reports, meeting.size, nodes_of_job())
        else:
            findings = judge(reports, links.speeds if links else {}, least)
        if links is not None and links.complete:
            print(describe(reports, links.speeds, links.overall), flush=True)
        if links is not None or not findings.ok:
            tell(findings, reports)
    return Findings(**meeting.hear(f"{name}_found", dataclasses.asdict(findings)))
