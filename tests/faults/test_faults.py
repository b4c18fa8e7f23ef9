"""Jobs that are killed, checkpoints that are damaged, disks that are full: every start after it goes on as it must."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import data.prepare
from tests.faults.campaign import DISKS, KINDS, RANKS, SETTINGS, TINY, Campaign, losses_of, may_mount
from tests.faults.job import ROOT, Job

FEW, MANY = 12, 220
STEPS_OF_FEW, STEPS_OF_MANY = 40, 200


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paragraphs of LICENSE as documents."""
    directory = tmp_path_factory.mktemp("corpus")
    paragraphs = (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n")
    source = directory / "license.jsonl"
    source.write_text("".join(json.dumps({"text": " ".join(p.split())}) + "\n" for p in paragraphs if p.strip()))
    arguments = ["--input", str(source), "--tokenizer", str(ROOT / "tests" / "assets" / "tokenizer.model")]
    assert data.prepare.main([*arguments, "--valid-fraction", "0.1", "--output", str(directory / "corpus")]) == 0
    return directory / "corpus"


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[int, tuple]]:
    """step -> (loss, gradient norm) of a run that ends by itself."""

    def curve(steps: int) -> dict[int, tuple]:
        directory = tmp_path_factory.mktemp("undisturbed")
        paths = [f"log.directory={directory}", f"data.corpora=[{{path: {corpus}}}]", f"train.steps={steps}"]
        rarely = ["checkpoint.keep_every=null", "checkpoint.every=1000"]
        job = Job([str(TINY), *paths, *SETTINGS, *rarely], RANKS, directory)
        assert job.wait(600) == [0] * RANKS, job.said()
        found = {step: (loss, norm) for step, loss, norm in losses_of(directory / "tiny")}
        assert sorted(found) == list(range(1, steps + 1))
        return found

    return curve


def suffer(directory: Path, corpus: Path, reference: dict[int, tuple], count: int, seed: int) -> Counter[str]:
    """So many faults of all kinds in an order that `seed` chooses, on one run after the other; what happened."""
    rng, runs = random.Random(seed), 0
    tally: Counter[str] = Counter()
    kinds = [kind for kind in KINDS if kind not in DISKS[:2] or may_mount(directory)]
    queue: list[str] = []
    campaign, skipped = None, 0
    while tally.total() < count:
        if campaign is None or campaign.finished:
            skipped += campaign.skipped if campaign is not None else 0
            runs += 1
            campaign = Campaign(directory, f"run_{runs}", corpus, reference, max(reference), rng)
        if not queue:
            queue = rng.sample(kinds, len(kinds))
        before = campaign.tally.total()
        campaign.suffer(queue[-1])
        if campaign.tally.total() > before:
            tally[queue.pop()] += 1
            if tally.total() % 20 == 0:
                so_far = ", ".join(f"{kind} {number}" for kind, number in sorted(tally.items()))
                print(f"{tally.total()} faults on {runs} runs: {so_far}", flush=True)
    assert campaign is not None
    campaign.finish()
    skipped += campaign.skipped
    print(
        f"\n{tally.total()} faults on {runs} runs of {max(reference)} steps, seed {seed}; {skipped} checkpoints skipped"
    )
    for kind in KINDS:
        print(f"  {tally[kind]:4d}  {kind}")
    return tally


def test_a_dozen_faults(tmp_path: Path, corpus: Path, undisturbed: Callable[[int], dict[int, tuple]]) -> None:
    tally = suffer(tmp_path, corpus, undisturbed(STEPS_OF_FEW), FEW, seed=1)
    missing = {kind for kind in KINDS if not tally[kind]}
    assert missing <= (set() if may_mount(tmp_path) else set(DISKS[:2]))


@pytest.mark.slow
def test_hundreds_of_faults(tmp_path: Path, corpus: Path, undisturbed: Callable[[int], dict[int, tuple]]) -> None:
    seed = int(os.environ.get("FAULTS_SEED", "2"))
    assert suffer(tmp_path, corpus, undisturbed(STEPS_OF_MANY), MANY, seed).total() >= 200
