"""configs/debug_<mixer>.yaml: each mixer learns to recall, and through its state.

The yardstick is the same stack with every mixer replaced by the identity, x -> x. Nothing then passes from one token to
another: what it answers is a function of the key alone. No such function does better on the held-out rows than the one
that knows beforehand which value each key has most often in them; values are drawn anew in every row, so that even this
one stays near chance. A short convolution sees a few tokens more, and what those give away is counted, too.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import RunConfig, load_config
from data.loader import Batch, Loader, validation_batches
from data.synthetic import NO_TARGET
from eval.ablate import without_recurrent_state
from eval.accuracy import accuracy
from models.lm import LM
from models.mixers import MIXERS
from models.restore import resolve_checkpoint, restore_model
from training.optimizer import parameter_groups
from training.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "configs").glob("debug_*.yaml"))
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
CPU_SECONDS = 60
LEARNED = 0.9


class Identity(nn.Module):
    """In a mixer's place: each token passes as it is."""

    def forward(self, x: Tensor, layout: Any, state: Any = None) -> tuple[Tensor, Any]:
        return x, state


def stack(run: RunConfig, *, identity: bool) -> LM:
    model = LM(run.model, seed=run.train.seed)
    if identity:
        for block in model.blocks:
            block.mixer = Identity()
    return model


def held_out(run: RunConfig) -> list[Batch]:
    size, vocabulary = run.train.micro_batch_size, run.model.vocab_size
    batches = validation_batches(run.data, micro_batch_size=size, dp_rank=0, dp_size=1, vocab_size=vocabulary)
    return list(batches)


def targets(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Keys and values that belong together, one of each a target."""
    keys = torch.cat([batch.input_ids[batch.labels != NO_TARGET] for batch in batches])
    return keys, torch.cat([batch.labels[batch.labels != NO_TARGET] for batch in batches])


def best_alone(batches: list[Batch]) -> float:
    """The highest accuracy that any function of the current token reaches on these rows."""
    keys, values = targets(batches)
    counts = torch.zeros(int(keys.max()) + 1, int(values.max()) + 1)
    counts.index_put_((keys, values), torch.ones(len(keys)), accumulate=True)
    return (counts.amax(1).sum() / len(keys)).item()


def best_nearby(run: RunConfig, batches: list[Batch]) -> float:
    """The accuracy to expect of the best function of what the convolutions see: where they see the answer it is right,
    elsewhere it has the current token alone."""
    taps = [getattr(run.model.mixer(kind), "conv_width", None) or 1 for kind in run.model.layers]
    reach = sum(width - 1 for width in taps)  # tokens before the current one
    seen = []
    for batch in batches:
        ids, asked = batch.input_ids, batch.labels != NO_TARGET
        answered = torch.zeros_like(asked)
        for distance in range(2, reach + 2):  # the value stands one token nearer than its key
            answered[:, distance:] |= ids[:, distance:] == ids[:, :-distance]
        seen.append(answered[asked])
    share = torch.cat(seen).float().mean().item()
    return share + (1 - share) * best_alone(batches)


def fit(model: LM, run: RunConfig) -> None:
    """The run's training without an engine around it."""
    settings = run.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), betas=settings.betas)
    size, vocabulary = run.train.batch_size, run.model.vocab_size
    loader = Loader(
        run.data, split="train", batch_size=size, micro_batch_size=size, dp_rank=0, dp_size=1, vocab_size=vocabulary
    )
    batches = loader.batches(0)
    for step in range(run.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=settings.lr, total_steps=run.train.steps, schedule=settings.schedule)
        (batch,) = next(batches)
        nll, _ = model(batch.input_ids, batch.positions, batch.labels)
        (nll.sum() / (batch.labels != NO_TARGET).sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    batches.close()


def assert_learned_through_its_state(run: RunConfig, model: LM, identity: LM) -> None:
    rows = held_out(run)
    found, bound = accuracy(model, rows), best_alone(rows)
    assert found > LEARNED > best_nearby(run, rows) > bound - 1e-6
    assert accuracy(identity, rows) <= bound
    with without_recurrent_state(model):
        assert accuracy(model, rows) <= bound


def test_every_recurrence_has_a_debug_run() -> None:
    runs = {path.stem: load_config(path).model.layers for path in RUNS}
    assert runs == {f"debug_{kind}": (kind, kind) for kind in MIXERS if "attention" not in kind}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_task_needs_a_memory(path: Path) -> None:
    """What is known without one, and that the identity has none: other tokens before a question change no answer."""
    run = load_config(path)
    rows = held_out(run)
    assert best_alone(rows) < 0.2
    assert best_nearby(run, rows) < 0.6
    ids, positions = rows[0].input_ids, rows[0].positions
    others = ids.roll(1, dims=0)
    others[:, -1] = ids[:, -1]
    for identity in (True, False):
        model = stack(run, identity=identity).requires_grad_(False)
        change = model(ids, positions)[0][:, -1] - model(others, positions)[0][:, -1]
        assert (change.abs().max() < 1e-5) == identity


def test_one_learns_in_a_few_steps() -> None:
    run = load_config(ROOT / "configs" / "debug_hgrn2.yaml", ["train.steps=120"])
    model, identity = stack(run, identity=False), stack(run, identity=True)
    fit(model, run)
    fit(identity, run)
    assert_learned_through_its_state(run, model, identity)


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_each_learns_within_a_minute(path: Path, tmp_path: Path) -> None:
    """The run as a user starts it, in CPU time: other work on the machine shall not count."""
    run = load_config(path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "train.py", str(path), f"log.directory={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    identity = stack(run, identity=True)
    fit(identity, run)
    assert_learned_through_its_state(run, restore_model(resolve_checkpoint(tmp_path / run.name)), identity)
