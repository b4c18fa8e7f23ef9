"""Tasks between two steps: the scores of one process on every arrangement of ranks, and steps that do not notice."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from configs.schema import ConfigError, RunConfig, load_config
from data.loader import Batch
from data.tokenizer import Tokenizer
from eval.in_loop import LoopModel, in_words, pack, tasks_of
from eval.model import EvalModel, LocalModel, Row, Scores, continuation
from eval.sampling import Sampling
from eval.tasks import TASKS
from models.lm import LM
from parallel.grid import Grid
from tests.eval.lm_eval_tasks import GENERATION, write_tasks
from tests.models.griffin import griffin, griffin_config
from tests.parallel.engines import Split, engine_of, global_batch, learning_rate, microbatches
from tests.parallel.mixed import TIME, config_of

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "assets" / "tiny.yaml"
TOKENIZER = ROOT / "tests" / "assets" / "tokenizer.model"
TWO = [Split(), Split(sequence=2), Split(tensor=2), Split(pipeline=2), Split(zero=3)]
FOUR = [Split(pipeline=2, tensor=2), Split(sequence=2, tensor=2)]


def some_rows() -> list[Row]:
    generator = np.random.default_rng(0)
    lengths = (1, 2, 5, 3, 24, 11, 13, 8, 7, 1)
    rows = [continuation([2], generator.integers(61, size=n).tolist()) for n in lengths]
    model = LM(config_of())
    with torch.no_grad():
        for row in rows[::2]:  # the most likely token is asked for
            input_ids = torch.from_numpy(row.input_ids)[None]
            row.labels[:] = model(input_ids, torch.arange(len(row.labels))[None])[0].argmax(-1)[0].numpy()
    return rows


def loop_model(engine: Any, **changes: Any) -> LoopModel:
    grid = engine.grid
    settings: dict[str, Any] = {
        "add_up": grid.sum,
        "collect": grid.gather,
        "data_rank": grid.dp_rank,
        "data_ranks": grid.dp_size,
        "rows": 2,
        "longest": TIME,
        "vocab_size": 61,
        "tokenizer": None,
        "whole": None,
    }
    return LoopModel(engine.judge, **settings | changes)


@pytest.fixture(scope="module")
def expected() -> list[Scores]:
    return LocalModel(LM(config_of()), None).score(some_rows())


PROMPTS = [[2, 3, 4], [2], [5, 6, 7, 8, 9], [2, 9], [7]]
GREEDY = Sampling(max_tokens=4, temperature=0)


def answers(grid: Grid, splits: list[Split]) -> list[tuple[list[tuple[Any, Any]], list[list[int]]]]:
    """Scores of rows and continuations of prompts by ranks none of which is told that it holds all."""
    found = []
    for split in splits:
        model = loop_model(engine_of(grid, split, config_of()))
        found.append(([tuple(scores) for scores in model.score(some_rows())], model.generate(PROMPTS, GREEDY)))
    return found


@pytest.mark.parametrize(("size", "splits"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_answers_are_those_of_one_process(ranks: Any, expected: list[Scores], size: int, splits: list[Split]) -> None:
    """Likelihoods, which labels are the most likely tokens, and greedy continuations, on every rank."""
    alone = LocalModel(LM(config_of()), None).generate(PROMPTS, GREEDY)
    assert len(set(map(tuple, alone))) > 1
    assert 0 < sum(one.hit.sum() for one in expected) < sum(len(one.hit) for one in expected)
    for of_rank in ranks(size).run(answers, splits=splits):
        for split, (found, continued) in zip(splits, of_rank, strict=True):
            assert continued == alone, split
            for (nll, hit), one in zip(found, expected, strict=True):
                np.testing.assert_allclose(nll, one.nll, rtol=1e-5, atol=1e-5, err_msg=str(split))
                assert (hit == one.hit).all(), split


def steps(grid: Grid, split: Split, asked: bool) -> list[tuple]:
    engine = engine_of(grid, split, config_of())
    whole = engine.module if split == Split() else None
    found = []
    for step in range(3):
        if asked:
            model = loop_model(engine, whole=whole)
            model.score(some_rows())
            if whole is not None:
                model.generate([[2], [3, 4], [5]], Sampling(max_tokens=3))
                assert engine.module.training
        found.append(tuple(engine.step(microbatches(engine, global_batch(step)), learning_rate(step))[:4]))
    return found


@pytest.mark.parametrize(
    "split", [pytest.param(Split(), marks=pytest.mark.slow), Split(pipeline=2)], ids=["data", "pipeline"]
)
def test_steps_do_not_notice(ranks: Any, split: Split) -> None:
    """To the bit."""
    with_tasks, without = (ranks(2).run(steps, split=split, asked=asked) for asked in (True, False))
    assert with_tasks == without


def continued(grid: Grid) -> list[list[int]]:
    engine = engine_of(grid, Split(), config_of())
    return loop_model(engine, whole=engine.module).generate(PROMPTS, GREEDY)


def test_prompts_are_dealt_to_data_ranks(ranks: Any) -> None:
    alone = LocalModel(LM(config_of()), None).generate(PROMPTS, GREEDY)
    assert ranks(2).run(continued) == [alone, alone]


class OneRank:
    """An engine of one process, which remembers the batches it was given."""

    def __init__(self, model: LM) -> None:
        self.model, self.batches = model, []

    def judge(self, batch: Batch, among: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append(batch)
        self.model.head.judges = among or 61
        with torch.no_grad():
            return self.model(batch.input_ids, batch.positions, batch.labels)


def of_one_rank(model: LM, **changes: Any) -> tuple[OneRank, LoopModel]:
    engine = OneRank(model)
    settings: dict[str, Any] = {"data_rank": 0, "data_ranks": 1, "rows": 2, "longest": TIME, "vocab_size": 61}
    settings |= {"tokenizer": None, "whole": model} | changes
    return engine, LoopModel(engine.judge, add_up=lambda z: z, collect=lambda z: [z], **settings)


def test_rows_share_the_rows_that_a_run_trains_on(expected: list[Scores]) -> None:
    engine, model = of_one_rank(LM(config_of()))
    found = model.score(some_rows())
    assert sum(len(batch.labels) for batch in engine.batches) == 4, "75 tokens in 4 rows of 24"
    assert {tuple(batch.labels.shape) for batch in engine.batches} == {(2, TIME)}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.nll, other.nll, rtol=1e-5, atol=1e-5)
    assert model.score([]) == []
    with pytest.raises(ValueError, match=r"^rows\[0\]: 25 tokens; at most 24 .*raise eval\.tasks_length"):
        model.score([continuation([2], [3] * 25)])


def test_texts_of_ranks_that_hold_parts() -> None:
    """Until EOS or a stop string, each row by itself, of the tokenizer's tokens alone."""
    tokenizer = Tokenizer(TOKENIZER)
    model = griffin(griffin_config(vocab_size=tokenizer.vocab_size + 64)).eval()
    with torch.no_grad():
        model.embed.weight[tokenizer.vocab_size :] *= 9  # rows without a token are the likeliest
    sampling, prompts = Sampling(max_tokens=12, temperature=0), [[2, 7, 9], [2], [2, 300, 301, 302]]
    local = LocalModel(model, tokenizer)
    free = local.generate_texts(prompts, sampling)
    stops = [free[0][3:5], "\n"]
    engine, parts = of_one_rank(model, tokenizer=tokenizer, whole=None, vocab_size=tokenizer.vocab_size + 64)
    assert parts.generate_texts(prompts, sampling) == free
    assert parts.generate(prompts, sampling) == local.generate(prompts, sampling)
    looks = len(engine.batches)
    assert parts.generate_texts(prompts, sampling, stops) == local.generate_texts(prompts, sampling, stops)
    assert looks > 0
    assert parts.generate_texts([], sampling) == []
    with pytest.raises(ValueError, match=r"^prompts\[1\]: 14 tokens and 12 to add; .*raise eval\.tasks_length"):
        parts.generate([[2], [2] * 14], sampling)


def test_packing_wastes_little_and_forgets_nothing() -> None:
    lengths = [5, 9, 1, 1, 10, 3, 4, 7]
    bins = pack(lengths, 10)
    assert sorted(i for members in bins for i in members) == list(range(8))
    assert all(sum(lengths[i] for i in members) <= 10 for members in bins)
    assert len(bins) == 4


def described(**settings: Any) -> RunConfig:
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
    return load_config(TINY, overrides)


@dataclass(frozen=True, kw_only=True)
class Speaks:
    """Continues something."""

    generates: ClassVar[bool] = True
    reads_text: ClassVar[bool] = False
    length: int = 3

    def check(self, vocab_size: int, longest: int | None) -> None:
        if longest is not None and self.length > longest:
            raise ValueError(f"length: {self.length}; must be at most {longest}")

    def examples(self, model: EvalModel) -> list[list[int]]:
        return [[1, 2]]

    def evaluate(self, model: EvalModel) -> dict[str, Any]:
        return {"spoken": len(model.generate(self.examples(model), Sampling(max_tokens=self.length))[0])}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"eval__tasks": ["bits_per_bite"]},
            r"tasks: 'bits_per_bite'; there is no such task; did you mean bits_per_byte",
        ),
        ({"eval__tasks": ["bits_per_byte"]}, r"eval\.task_options\.bits_per_byte\.path: missing"),
        (
            {"eval__tasks": ["speaks"], "eval__task_options": {"spaeks": {}}},
            r"eval\.task_options\.spaeks: settings, but",
        ),
        (
            {"eval__tasks": ["speaks"], "eval__task_options": {"speaks": {"length": 49}}},
            r"eval\.task_options\.speaks\.length: 49; must be at most 48",
        ),
        (
            {"eval__tasks": ["speaks"], "parallel__sequence": 2},
            r"eval\.tasks: speaks continues prompts with tokens that it draws, but no rank",
        ),
        ({"eval__tasks": ["speaks"], "parallel__zero_stage": 3}, r"eval\.tasks: speaks continues prompts"),
        ({"eval__tasks": ["speaks"], "parallel__pipeline": 2}, r"eval\.tasks: speaks continues prompts"),
        (
            {"eval__tasks": ["speaks"], "parallel__sequence": 2, "eval__tasks_length": 9},
            r"eval\.tasks_length: 9; must be a multiple of parallel\.sequence \(2\): choose e\.g\. 10",
        ),
        (
            {"eval__tasks": ["tiny_drawing"], "parallel__tensor": 2},
            r"eval\.tasks: tiny_drawing continues prompts with tokens that it draws",
        ),
        ({"eval__tasks": ["tiny_beams"]}, r"tasks: tiny_beams: generation_kwargs: num_beams; known are "),
        ({"eval__tasks": ["tiny_choice"], "no_tokenizer": True}, r"eval\.tasks: tiny_choice needs text, but the data"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_built(
    settings: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setitem(TASKS, "speaks", Speaks)
    include = write_tasks(tmp_path / "tasks")
    for name, settings_of in {"tiny_drawing": "do_sample: true", "tiny_beams": "num_beams: 4"}.items():
        text = GENERATION.replace("tiny_generation", name).replace("do_sample: false", settings_of)
        (include / f"{name}.yaml").write_text(text)

    def local(**_: Any) -> Any:  # indexing all tasks takes half a minute
        return TaskManager(include_path=str(include), include_defaults=False)

    monkeypatch.setattr("eval.harness_tasks._task_manager_class", lambda: local)
    path = None if settings.pop("no_tokenizer", False) else TOKENIZER
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        tasks_of(described(**settings, eval__tasks_every=2, eval__tasks_include=str(include)), path)
    assert "\n" not in str(caught.value)


def test_a_greedy_task_is_asked_of_ranks_that_hold_parts(tmp_path: Path) -> None:
    include = write_tasks(tmp_path / "tasks")
    settings = {"eval__tasks": ["tiny_generation", "tiny_choice"], "eval__tasks_every": 2}
    for split in ("pipeline", "tensor", "sequence"):
        changes = {f"parallel__{split}": 2, "eval__tasks_include": str(include)}
        assert list(tasks_of(described(**settings, **changes), TOKENIZER)) == settings["eval__tasks"]


def test_tasks_and_their_times_are_given_together() -> None:
    for settings in ({"eval__tasks": ["bits_per_byte"]}, {"eval__tasks_every": 3}):
        with pytest.raises(ConfigError, match=r"eval\.tasks_every: .*give both, or neither"):
            described(**settings)


def test_no_tasks_need_nothing() -> None:
    assert tasks_of(described(), None) == {}


def test_in_words() -> None:
    found = {"task/a/accuracy": 0.51239, "task/a/n": 3, "task/b/map": [[1]], "task/b/hits": 2}
    assert in_words(found) == "a accuracy 0.5124, b hits 2"
    assert not re.search("map", in_words(found))
