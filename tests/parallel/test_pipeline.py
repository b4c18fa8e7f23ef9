"""Pipeline stages: loss, norm and every parameter's gradient equal to one process, and the engine's whole contract."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from models.lm import LM
from parallel.grid import Grid
from parallel.stages import stages_of
from parallel.traffic import Key, Volume, counted
from parallel.volume import Split as VolumeSplit
from parallel.volume import traffic_of
from tests.parallel.engines import (
    NOISE,
    STEPS,
    Curve,
    Split,
    alone_in_float64,
    curve,
    curve_alone,
    engine_of,
    global_batch,
    microbatches,
    noisy_engine,
    step_in_float64,
    take,
    worst,
)
from tests.parallel.mixed import TIME, config_of, noise
from tests.parallel.saving import save
from tests.parallel.tiny import OPTIMIZER, Batch

# Of keys of 4 features some are so near to zero that normalising them magnifies what rounding leaves.
WIDE_KEYS = {"gated_deltanet": {"head_dim": 16}, "attention": {"head_dim": 16}}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixed": {"changes": WIDE_KEYS},
    "griffin": {"layers": ("rglru", "rglru", "local_attention", "rglru")},
    "hgrn2": {"layers": ("hgrn2",) * 4, "tied": False},
    "gated_deltanet": {"layers": (*("gated_deltanet",) * 3, "attention"), "tied": False, "changes": WIDE_KEYS},
    "paralstm": {"layers": ("paralstm",) * 4, "tied": False},
}
"""Stacks of the presets' patterns, and one of every mixer."""

CASES: dict[int, list[tuple[str, Split]]] = {
    2: [
        *((family, Split(2)) for family in FAMILIES),
        ("mixed", Split(2, num_microbatches=1, stages=(6, 1))),
        ("hgrn2", Split(2, stages=(1, 3))),
    ],
    4: [
        ("mixed", Split(2, 2)),
        ("mixed", Split(2, 1, 2)),
        ("mixed", Split(2, num_microbatches=1)),
        ("mixed", Split(4)),
        ("hgrn2", Split(4, num_microbatches=1)),
    ],
    8: [("mixed", Split(2, 2, 2)), ("mixed", Split(4, 1, 2)), ("mixed", Split(2, 1, 2, num_microbatches=1))],
}
"""Families and arrangements by the number of ranks."""


def steps(grid: Grid, cases: list[tuple[str, Split]]) -> list[dict[str, Tensor]]:
    return [step_in_float64(grid, split, FAMILIES[family]) for family, split in cases]


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    return {family: alone_in_float64(config_of(**settings)) for family, settings in FAMILIES.items()}


@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_gradients_equal_one_process(ranks: Any, expected: dict[str, dict[str, Tensor]], size: int) -> None:
    of_ranks = ranks(size).run(steps, cases=CASES[size])
    for i, (family, split) in enumerate(CASES[size]):
        found = worst([of_rank[i] for of_rank in of_ranks], expected[family])
        assert max(found.values()) <= 1e-9, (family, split, max(found.items(), key=lambda item: item[1]))


def step_of_sharded_norms(grid: Grid) -> dict[str, Tensor]:
    return step_in_float64(grid, Split(2, 1, 2), {}, parallel={"sequence_sharded_norms": True})


def test_a_stream_cut_over_tensor_ranks_travels_as_it_is(ranks: Any) -> None:
    found = worst(ranks(4).run(step_of_sharded_norms), alone_in_float64(config_of()))
    assert max(found.values()) <= 1e-9


MIXED: dict[str, Any] = {
    "layers": ("hgrn2", "gated_deltanet", "hgrn2", "paralstm", "local_attention"),
    "changes": WIDE_KEYS,
}
CURVES: dict[int, list[Split]] = {2: [Split(2), Split(2, zero=0)], 4: [Split(2, 1, 2, zero=0)]}


@pytest.fixture(scope="module")
def reference() -> tuple[Curve, dict[str, Tensor]]:
    return curve_alone(config_of(**MIXED))


def curves(grid: Grid, splits: list[Split], **changes: Any) -> list[tuple[Curve, dict[str, Tensor]]]:
    return [curve(grid, split, MIXED, **changes) for split in splits]


@pytest.mark.parametrize("size", CURVES)
def test_the_curve_of_one_process(ranks: Any, reference: tuple[Curve, dict[str, Tensor]], size: int) -> None:
    wanted, gradients = reference
    of_ranks = ranks(size).run(curves, splits=CURVES[size])
    for i, split in enumerate(CURVES[size]):
        assert len({json.dumps(of_rank[i][0]) for of_rank in of_ranks}) == 1, "every rank tells the same"
        torch.testing.assert_close(torch.tensor(of_ranks[0][i][0]), torch.tensor(wanted), rtol=1e-5, atol=0.0)
        errors = worst([of_rank[i][1] for of_rank in of_ranks], gradients)
        assert max(errors.values()) <= 1e-5, (split, errors)


def in_bf16(grid: Grid, splits: list[Split]) -> list[tuple[Curve, dict[str, Tensor]]]:
    return [curve(grid, split, FAMILIES["mixed"], precision="bf16") for split in splits]


def test_bf16_is_that_of_one_process_and_repeats_to_the_bit(ranks: Any) -> None:
    """A pipeline rounds nothing otherwise than one process does."""
    ((alone, gradients),) = ranks(1).run(in_bf16, splits=[Split()])[0]
    of_ranks = ranks(2).run(in_bf16, splits=[Split(2), Split(2)])
    for first, again in of_ranks:
        assert first[0] == again[0]
        torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(alone), rtol=1e-6, atol=0.0)
    assert max(worst([of_rank[0][1] for of_rank in of_ranks], gradients).values()) <= 1e-6
    wide, _ = curve_alone(config_of(**FAMILIES["mixed"]))
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(wide), rtol=2e-2, atol=0.0)


def losses(grid: Grid, split: Split) -> tuple[list[tuple[Tensor, Tensor]], Curve]:
    """What two looks find, of fewer rows than a microbatch and of as many, between two steps; and these steps."""
    engine = noisy_engine(grid, split, MIXED)
    found: list[Any] = []
    whole = global_batch(7)
    looks = [Batch(*(field[:rows] for field in whole)) for rows in (1, 2)]
    found.append((*engine.judge(looks[0]), engine.judge(looks[0], among=9)[1]))
    found.append((engine.evaluate(looks[1]), engine.evaluate(looks[1])))
    assert engine.module.training
    taken: Curve = []
    for step in range(2):
        taken += take(engine, range(step, step + 1))
        assert engine.evaluate(looks[0]).shape == looks[0].labels.shape
    return found, taken


def test_every_rank_validates_alike_and_training_goes_on(
    ranks: Any, reference: tuple[Curve, dict[str, Tensor]]
) -> None:
    model = LM(config_of(**MIXED))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += NOISE * noise(name, parameter.shape).float()
    whole = global_batch(7)
    with torch.no_grad():
        nll, _ = model(whole.input_ids, whole.positions, whole.labels)
        logits = model(whole.input_ids, whole.positions)[0]
    for (judged, evaluated), taken in ranks(2).run(losses, split=Split(2)):
        torch.testing.assert_close(judged[0], nll[:1], rtol=1e-5, atol=1e-6)
        assert torch.equal(judged[1].long(), logits[:1].argmax(-1))
        assert torch.equal(judged[2].long(), logits[:1, :, :9].argmax(-1))
        torch.testing.assert_close(evaluated[0], nll[:2], rtol=1e-5, atol=1e-6)
        assert torch.equal(*evaluated)
        torch.testing.assert_close(torch.tensor(taken), torch.tensor(reference[0][:2]), rtol=1e-5, atol=0.0)


def refused(grid: Grid) -> list[tuple[bool, float, bool, int, bool]]:
    """Of steps whose gradient, or gradient and loss, are not finite, and of one that only the last rank refuses:
    accepted, norm, stop, updates, and whether weights and moments are as they were."""
    found = []
    for zero in (0, 1):
        for case in ("gradient", "loss", "refused"):
            engine = engine_of(
                grid, Split(2, zero=zero), config_of(**MIXED), z_loss=1e38 if case == "gradient" else 0.0
            )
            if case == "loss" and grid.rank == 1:
                name = engine.state.names[-1]
                engine.state.assign(name, "weight", torch.full(engine.state.shapes[name], torch.nan))
            before = [
                engine.state.gather(name, kind) + 0 for name in engine.state.names for kind in ("weight", "exp_avg")
            ]
            result = engine.step(
                microbatches(engine, global_batch(0)), 1e-3, stop=grid.rank == 1, accept=lambda *_: grid.rank == 0
            )
            after = [engine.state.gather(name, kind) for name in engine.state.names for kind in ("weight", "exp_avg")]
            same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after))
            found.append((result.accepted, result.grad_norm, result.stop, engine.state.num_updates, same))
    return found


def test_nothing_is_updated_on_a_step_that_is_not_finite_or_refused(ranks: Any) -> None:
    first, second = ranks(2).run(refused)
    assert str(first) == str(second)
    for i, (accepted, norm, stop, updates, same) in enumerate(first):
        assert (accepted, stop, updates, same) == (False, True, 0, True)
        assert torch.tensor(norm).isfinite() == (i % 3 == 2)


def wrong_number(grid: Grid) -> str:
    engine = engine_of(grid, Split(2), config_of(**MIXED), optimizer=replace(OPTIMIZER, clip_norm=None))
    with pytest.raises(ValueError, match="1 microbatches") as caught:
        engine.step(microbatches(engine, global_batch(0))[:1], 1e-3)
    norms = [engine.step(microbatches(engine, global_batch(0)), 0.0).grad_norm for _ in range(2)]
    assert norms[0] == norms[1], "not clipped, and nothing left over from the step before"
    return str(caught.value)


def test_a_wrong_number_of_microbatches_is_refused(ranks: Any) -> None:
    assert ranks(2).run(wrong_number) == ["1 microbatches; this engine takes 2 a step"] * 2


def save_after_two(grid: Grid, directory: Path, splits: list[Split]) -> None:
    for split in splits:
        engine = noisy_engine(grid, split, MIXED)
        take(engine, range(2))
        save(engine, directory / str(split), step=2)


def go_on(grid: Grid, directory: Path, pairs: list[tuple[Split, Split]]) -> list[Curve]:
    from parallel.checkpoint import find_checkpoint, load_checkpoint

    found = []
    for saved, loads in pairs:
        engine = engine_of(grid, loads, config_of(**MIXED), seed=1)
        path, _ = find_checkpoint(grid, directory / str(saved))
        load_checkpoint(engine, path)
        found.append(take(engine, range(2, STEPS)))
    return found


@pytest.mark.slow
def test_checkpoints_move_between_stages_and_any_other_split(
    ranks: Any, reference: tuple[Curve, dict[str, Tensor]], tmp_path: Path
) -> None:
    stages, parts, both = Split(2), Split(1, 1, 2), Split(2, 1, 2)
    ranks(2).run(save_after_two, directory=tmp_path, splits=[stages, parts])
    found = ranks(2).run(go_on, directory=tmp_path, pairs=[(parts, Split(2, zero=0, stages=(1, 4))), (stages, parts)])
    found += ranks(1).run(go_on, directory=tmp_path, pairs=[(stages, Split())])
    found += ranks(4).run(go_on, directory=tmp_path, pairs=[(stages, both)])
    for of_rank in found:
        for continued in of_rank:
            torch.testing.assert_close(torch.tensor(continued), torch.tensor(reference[0][2:]), rtol=1e-5, atol=0.0)


Sent = tuple[dict[Key, Volume], int, int]


def travelled(grid: Grid, splits: list[Split], sharded_norms: bool) -> list[Sent]:
    """What a step counts of layers and between stages, and the bytes and calls by which DeepSpeed sent."""
    from deepspeed.runtime.pipe import p2p

    found = []
    for split in splits:
        norms = {"sequence_sharded_norms": sharded_norms and split.tensor > 1}
        engine = engine_of(grid, split, config_of(**MIXED), parallel=norms)
        engine.step(microbatches(engine, global_batch(0)), 1e-3)  # the first one sends shapes besides
        with counted(engine.module) as traffic, mock.patch.object(p2p, "send", wraps=p2p.send) as send:
            engine.step(microbatches(engine, global_batch(1)), 1e-3)
        tensors = [call.args[0] for call in send.call_args_list]
        of_layers = {key: z for key, z in traffic.volumes.items() if key.layer or key.operation == "send"}
        found.append((of_layers, sum(z.numel() * z.element_size() for z in tensors), len(tensors)))
    return found


@pytest.mark.parametrize(
    ("size", "splits", "sharded_norms"),
    [(2, [Split(2), Split(2, num_microbatches=4)], False), (4, [Split(2, 1, 2)], True)],
)
def test_what_is_sent_equals_its_formulas(ranks: Any, size: int, splits: list[Split], sharded_norms: bool) -> None:
    with torch.device("meta"):
        model = LM(config_of(**MIXED))
    for rank, of_rank in enumerate(ranks(size).run(travelled, splits=splits, sharded_norms=sharded_norms)):
        for split, (found, num_bytes, calls) in zip(splits, of_rank, strict=True):
            index = rank // (size // split.pipeline)
            one = traffic_of(
                model,
                VolumeSplit(
                    rows=4 // split.num_microbatches,
                    time=TIME,
                    sequence=split.sequence,
                    tensor=split.tensor,
                    index=rank // split.tensor % split.sequence,
                    narrow=4,
                    sharded_norms=sharded_norms and split.tensor > 1,
                ),
                stages_of(model, TIME, split.pipeline),
                index,
            )
            times = split.num_microbatches
            assert found == {key: Volume(times * z.calls, times * z.bytes) for key, z in one.items()}
            assert found[Key("", "pipeline", "send")] == Volume(calls, num_bytes), "counted as it was sent"
