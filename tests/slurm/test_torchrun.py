"""The command of docs/cluster.md for machines without Slurm: an agent each on two nodes that are this machine."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import free_ports
from tests.slurm.training import ASSETS, PATIENCE, PLAIN, ROOT, losses, resumed, settings

pytestmark = pytest.mark.slow


def documented() -> list[str]:
    """The options of the command for several machines."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"torchrun (--nnodes 4 .*?) train\.py CONFIG", page, flags=re.DOTALL)
    return command.replace("\\\n", " ").split()


def test_two_agents_meet_and_leave_and_come_back(corpus: Path, alone: dict[int, float], tmp_path: Path) -> None:
    words = {"4": "2", "8": "1", "HOST:29500": f"127.0.0.1:{free_ports(1)[0]}"}
    options = [words.get(word, word) for word in documented()]
    assert "NAME" in options
    overrides = settings(corpus, tmp_path, "two")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        "train.py",
        str(ASSETS / "tiny.yaml"),
        *overrides,
    ]

    def start() -> list[subprocess.Popen[str]]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        return [subprocess.Popen(command, cwd=ROOT, env=os.environ | PLAIN, **streams) for _ in range(2)]  # type: ignore[call-overload]

    def end(agents: list[subprocess.Popen[str]]) -> str:
        said = [agent.communicate(timeout=PATIENCE)[0] for agent in agents]
        return "\n--- the other\n".join(said)

    agents = start()
    deadline = time.monotonic() + PATIENCE
    while max(losses(tmp_path / "two"), default=0) < 5:
        assert time.monotonic() < deadline, [agent.kill() for agent in agents] and end(agents)
        time.sleep(0.1)
    for agent in agents:
        agent.terminate()
    said = end(agents)
    ending = json.loads((tmp_path / "two" / "exit.json").read_text())
    assert (ending["reason"], ending["detail"]) == ("interrupted", "SIGTERM"), said
    agents = start()
    said = end(agents)
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert resumed(tmp_path / "two")
    found = losses(tmp_path / "two")
    assert found == pytest.approx(alone, rel=1e-4), said
