"""A cluster, a corpus, and the losses that one process makes of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster
from tests.slurm.training import ASSETS, PLAIN, ROOT, losses, preparation, settings

NODES = 4
"""One to take the place of another in a job of three."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(f"no Slurm can be started here: {reason}")
    with running_cluster(tmp_path_factory.mktemp("slurm"), NODES) as started:
        started.environment["PYTHON"] = sys.executable
        yield started


@pytest.fixture(autouse=True)
def left_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves no jobs to the next."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files, a part of the preparation each."""
    directory = tmp_path_factory.mktemp("texts")
    license = (ROOT / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [" ".join(paragraph.split()) for paragraph in license.split("\n\n") if paragraph.strip()]
    for i in range(8):
        content = "".join(f"{json.dumps({'text': f'{i}: {paragraph}'})}\n" for paragraph in paragraphs)
        (directory / f"{i}.jsonl").write_text(content * (2**20 // len(content) + 1), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def corpus(texts: Path) -> Path:
    """What one process prepares."""
    run_here("-m", "data.prepare", *preparation(texts, texts / "whole"), "--workers", "1")
    return texts / "whole"


@pytest.fixture(scope="session")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process."""
    runs = tmp_path_factory.mktemp("alone")
    run_here("train.py", str(ASSETS / "tiny.yaml"), *settings(corpus, runs, "one"))
    return losses(runs / "one")


def run_here(*arguments: str) -> None:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | PLAIN, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
