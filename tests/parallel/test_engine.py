import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.config import ParallelConfig
from parallel.grid import Grid
from tests.parallel.tiny import (
    OPTIMIZER,
    Z_LOSS,
    Batch,
    global_batch,
    learning_rate,
    microbatches,
    tiny_engine,
    tiny_model,
    train,
)
from training.optimizer import parameter_groups

STEPS = range(5)
STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float, float, int]]:
    """The same training in one process, by torch alone, on the whole batch at once."""
    model = tiny_model()
    adamw = torch.optim.AdamW(
        parameter_groups(model, OPTIMIZER.weight_decay), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    results = []
    for step in STEPS:
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step)
        batch = global_batch(step)
        tokens = int((batch.labels != -100).sum())
        nll, log_z = model(batch.input_ids, batch.positions, batch.labels)
        loss, z_loss = nll.sum() / tokens, log_z.square().sum() / tokens
        adamw.zero_grad()
        (loss + Z_LOSS * z_loss).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        adamw.step()
        results.append((loss.item(), z_loss.item(), norm.item(), tokens))
    return results


def trajectories(grid: Grid, runs: dict[str, dict[str, Any]]) -> dict[str, list[tuple]]:
    return {name: train(tiny_engine(grid, **arguments), STEPS) for name, arguments in runs.items()}


def assert_same_curve(results, expected):
    torch.testing.assert_close(torch.tensor(results), torch.tensor(expected), rtol=1e-5, atol=0.0)


def test_every_zero_stage_follows_plain_adamw(ranks, reference):
    assert all(norm > OPTIMIZER.clip_norm for _, _, norm, _ in reference)
    runs = {f"stage {stage}": {"zero_stage": stage, "num_microbatches": 2} for stage in STAGES}
    for per_rank in ranks(2).run(trajectories, runs=runs):
        for results in per_rank.values():
            assert_same_curve(results, reference)


@pytest.mark.parametrize(("size", "num_microbatches"), [(1, 4), (2, 1), (4, 1)])
def test_the_split_of_the_batch_does_not_matter(ranks, reference, size, num_microbatches):
    runs = {"split": {"zero_stage": 1, "num_microbatches": num_microbatches}}
    for per_rank in ranks(size).run(trajectories, runs=runs):
        assert_same_curve(per_rank["split"], reference)


class Affine(nn.Module):
    """nll = weight . x + bias at every token, in fp32 always: only a reduction can round its gradients."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.map = nn.Linear(4, 1)
        nn.init.constant_(self.map.weight, scale)
        nn.init.zeros_(self.map.bias)

    def forward(self, input_ids: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.stack([input_ids, positions, input_ids * positions, positions + 1], dim=-1) / 64.0
        nll = ((features * self.map.weight).sum(dim=-1) + self.map.bias) * (labels != -100)
        return nll, torch.zeros_like(nll)


def affine_norms(grid: Grid, stages: list[int], precision: str) -> list[float]:
    engines = [tiny_engine(grid, zero_stage=stage, model=Affine(), precision=precision) for stage in stages]
    return [engine.step(microbatches(grid, 0, 1), 0.0).grad_norm for engine in engines]


def test_bf16_reduces_gradients_in_fp32(ranks):
    fp32 = ranks(2).run(affine_norms, stages=STAGES, precision="fp32")[0]
    bf16 = ranks(2).run(affine_norms, stages=STAGES, precision="bf16")[0]
    torch.testing.assert_close(bf16, fp32, rtol=1e-5, atol=0.0)


def bf16_training(grid: Grid) -> tuple[list[list[tuple]], set[torch.dtype]]:
    engines = [tiny_engine(grid, zero_stage=stage, precision="bf16") for stage in STAGES]
    curves = [train(engine, STEPS) for engine in engines]
    return curves, {parameter.dtype for engine in engines for parameter in engine.module.parameters()}


def test_bf16_keeps_fp32_parameters_and_stays_near_fp32(ranks, reference):
    curves, dtypes = ranks(2).run(bf16_training)[0]
    assert dtypes == {torch.float32}
    for curve in curves:
        for (loss, *_), (expected, *_) in zip(curve, reference, strict=True):
            assert loss == pytest.approx(expected, rel=5e-3)
            assert loss != expected


def weights(engine: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def step_without_targets(grid: Grid) -> list[tuple[tuple, bool]]:
    outcomes = []
    for stage in STAGES:
        engine = tiny_engine(grid, zero_stage=stage)
        batch = microbatches(grid, 0, 1)[0]
        result = engine.step([batch._replace(labels=torch.full_like(batch.labels, -100))], 1e-2)
        outcomes.append((result[:4], all(w.isfinite().all() for w in weights(engine))))
    return outcomes


def test_a_batch_without_targets_is_harmless(ranks):
    assert ranks(2).run(step_without_targets)[1] == [((0.0, 0.0, 0.0, 0), True)] * len(STAGES)


def step_with_targets_on_one_rank(grid: Grid) -> list[tuple]:
    batch = microbatches(grid, 0, 1)[0]
    if grid.rank == 1:
        batch = batch._replace(labels=torch.full_like(batch.labels, -100))
    return [tiny_engine(grid, zero_stage=stage).step([batch], 1e-2)[:4] for stage in STAGES]


def test_a_rank_without_targets_does_not_dilute_the_loss(ranks):
    batch = global_batch(0)
    rows = Batch(*(field[:2] for field in batch))
    model = tiny_model()
    nll, log_z = model(rows.input_ids, rows.positions, rows.labels)
    ((nll.sum() + Z_LOSS * log_z.square().sum()) / 11).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    for results in ranks(2).run(step_with_targets_on_one_rank):
        for loss, _, grad_norm, tokens in results:
            assert tokens == 11
            assert loss == pytest.approx(nll.sum().item() / 11, rel=1e-6)
            assert grad_norm == pytest.approx(norm.item(), rel=1e-5)


def step_on_broken_gradient(grid: Grid) -> list[tuple[float, bool, int]]:
    """The gradient overflows on the last rank only."""
    outcomes = []
    for stage in STAGES:
        engine = tiny_engine(grid, zero_stage=stage, model=Affine())
        poison = float("inf") if grid.rank == 1 else 0.0
        hook = engine.module.map.bias.register_hook(lambda grad, poison=poison: grad + poison)
        before = weights(engine)
        norm = engine.step(microbatches(grid, 0, 1), 1e-2).grad_norm
        hook.remove()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
        engine.step(microbatches(grid, 1, 1), 1e-2)
        outcomes.append((norm, unchanged, engine.state.num_updates))
    return outcomes


def test_a_gradient_that_is_not_finite_is_reported_and_not_applied(ranks):
    for outcomes in ranks(2).run(step_on_broken_gradient):
        for norm, unchanged, num_updates in outcomes:
            assert not math.isfinite(norm)
            assert unchanged
            assert num_updates == 1


def evaluate_in_between(grid: Grid, stage: int) -> tuple[Tensor, list[tuple], list[tuple], bool]:
    plain, evaluated = (tiny_engine(grid, zero_stage=stage, num_microbatches=2) for _ in range(2))
    nll = evaluated.evaluate(global_batch(7))
    results = []
    for step in STEPS:
        results += train(evaluated, range(step, step + 1))
        evaluated.evaluate(global_batch(7))
    return nll, train(plain, STEPS), results, evaluated.module.training


@pytest.mark.parametrize("stage", [2, 3])
def test_evaluation_leaves_training_alone(ranks, stage):
    batch = global_batch(7)
    with torch.no_grad():
        expected, _ = tiny_model()(batch.input_ids, batch.positions, batch.labels)
    nll, plain, evaluated, training = ranks(2).run(evaluate_in_between, stage=stage)[1]
    torch.testing.assert_close(nll, expected)
    assert not nll.requires_grad
    assert evaluated == plain
    assert training


def stopping(grid: Grid) -> list[tuple[Any, tuple[int, int]]]:
    """Steps with nobody, the second and every rank asking for a stop, and the engine's own collectives in each."""
    outcomes = []
    for stage in STAGES:
        engine = tiny_engine(grid, zero_stage=stage)
        for step, stop in enumerate((False, grid.rank == 1, True)):
            with (
                mock.patch("parallel.engine.dist", wraps=dist) as before,
                mock.patch("parallel.collectives.dist", wraps=dist) as after,
            ):
                result = engine.step(microbatches(grid, step, 1), 1e-2, stop=stop)
            outcomes.append((result, (len(before.mock_calls), len(after.mock_calls))))
    return outcomes


def test_a_stop_on_any_rank_is_known_to_all_and_changes_nothing_else(ranks, reference):
    first, second = ranks(2).run(stopping)
    assert first == second
    assert [result.stop for result, _ in first] == [False, True, True] * len(STAGES)
    assert [result.tokens for result, _ in first] == [tokens for *_, tokens in reference[:3]] * len(STAGES)
    assert {counts for _, counts in first} == {(2, 1)}, (
        "the counts before the step; the sums and the word on the update"
    )


def refusals(grid: Grid) -> list[str]:
    messages = []
    for call in (
        lambda: tiny_engine(grid, zero_stage=1, model=tiny_model(seed=grid.rank)),
        lambda: tiny_engine(grid, zero_stage=1).step(microbatches(grid, 0, 2), 1e-2),
        lambda: tiny_engine(grid, zero_stage=1, parallel=with_engine(zero_optimization={"overlap_com": True})),
        lambda: tiny_engine(grid, zero_stage=1, parallel=with_engine(checkpoint={"tag_validation": "NEVER"})),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_wrong_use_is_refused(ranks):
    for differ, count, *configurations in ranks(2).run(refusals):
        assert "initial weights differ between ranks" in differ
        assert "embed.weight" in differ
        assert count == "2 microbatches; this engine takes 1 a step"
        for message, names in zip(configurations, ("overlap_com ", "tag_validation value of NEVER"), strict=True):
            assert message.startswith("parallel.engine: {")
            assert "DeepSpeed refuses it" in message
            assert names in message
            assert message.endswith("correct or remove the key that it names")


def with_engine(**engine: Any) -> ParallelConfig:
    return ParallelConfig(engine=engine)


def with_extra_keys(grid: Grid) -> list[tuple]:
    extra = {"zero_optimization": {"reduce_bucket_size": 500, "allgather_bucket_size": 500}}
    return train(tiny_engine(grid, zero_stage=2, parallel=ParallelConfig(zero_stage=2, engine=extra)), STEPS)


def test_extra_engine_keys_reach_deepspeed_and_change_no_result(ranks, reference):
    assert_same_curve(ranks(2).run(with_extra_keys)[0], reference)
