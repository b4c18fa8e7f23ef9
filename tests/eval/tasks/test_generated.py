"""The generated tasks as evaluation: what a perfect model, a random one and one that gives out score."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from data.synthetic import TASKS as GENERATED
from data.synthetic import SyntheticRows
from eval.model import Row
from eval.tasks import TASKS, check_task, make_task
from eval.tasks.generated import Generated
from tests.eval.tasks.fakes import Fake, at_random, perfect

NAMES = [name for name, kind in TASKS.items() if issubclass(kind, Generated)]
STATES = [name for name in NAMES if GENERATED[name].prefix_closed]


def test_every_generator_is_a_task_with_the_same_settings() -> None:
    """A run trained on `synthetic:NAME` with some options is asked by NAME with the same ones."""
    assert set(GENERATED) <= set(TASKS)
    for name, kind in GENERATED.items():
        fields = {field.name: field.default for field in dataclasses.fields(TASKS[name])}
        for field in dataclasses.fields(kind):
            assert fields[field.name] == field.default
            assert getattr(make_task(name, {field.name: "3"}), field.name) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_model_and_a_random_one(name: str) -> None:
    task = make_task(name, {"lengths": "40,80", "rows": "24"})
    check_task(name, task, 120, None)
    found = task.evaluate(Fake(perfect))
    assert found["accuracy"] == found["rows_right"] == found["accuracy_40"] == found["accuracy_80"] == 1.0
    assert found["accuracy_stderr"] == 0.0
    rows = task.examples(Fake(perfect))
    assert found["rows"] == len(rows) == (24 if name in STATES else 48)
    assert found["targets"] == sum(int((row.labels >= 0).sum()) for row in rows)
    share = 0.3
    by_chance = task.evaluate(Fake(at_random(share)))
    error = (share * (1 - share) / found["targets"]) ** 0.5
    assert abs(by_chance["accuracy"] - share) < 4 * error
    assert by_chance["rows_right"] < 0.9
    assert task.evaluate(Fake(lambda row, t: 1.0))["accuracy"] == 0.0


@pytest.mark.parametrize("name", STATES)
def test_accuracy_by_length_is_of_the_tokens_beyond_the_length_before(name: str) -> None:
    """One set of rows serves all lengths, and a model that gives out after 32 tokens is right up to there alone."""
    task = make_task(name, {"lengths": "16,32,64,128", "rows": "3"})
    fake = Fake(lambda row, t: 0.0 if t < 32 else 1.0)
    found = task.evaluate(fake)
    assert fake.calls == [3]
    assert [found[f"accuracy_{length}"] for length in (16, 32, 64, 128)] == [1.0, 1.0, 0.0, 0.0]
    assert found["accuracy"] == 0.25
    assert found["rows_right"] == 0.0


def test_other_tasks_draw_rows_of_each_length() -> None:
    task = make_task("copying", {"lengths": [20, 40], "rows": 5})
    fake = Fake(lambda row, t: 0.0 if len(row.labels) == 20 else 1.0)
    found = task.evaluate(fake)
    assert [len(row.labels) for row in task.examples(fake)] == [20] * 5 + [40] * 5
    assert (found["accuracy_20"], found["accuracy_40"]) == (1.0, 0.0)
    assert found["accuracy"] == pytest.approx(1 / 3), "of 15 targets, 10 stand in the longer rows"
    assert found["rows_right"] == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_a_function_of_the_settings_and_of_no_run(name: str) -> None:
    def rows(**settings: Any) -> list[np.ndarray]:
        return [
            np.stack(row) for row in make_task(name, {"lengths": [40], "rows": 4} | settings).examples(Fake(perfect))
        ]

    assert np.array_equal(rows(), rows())
    assert not np.array_equal(rows(), rows(seed=1))
    assert np.array_equal(rows(), rows(rows=6)[:4])
    trained = SyntheticRows(f"synthetic:{name}", {}, split="train", seed=0, sequence_length=40, vocab_size=120)
    assert not any(np.array_equal(row, trained[i][:2]) for i in range(4) for row in rows())


@pytest.mark.parametrize(
    ("name", "settings", "longest", "message"),
    [
        (
            "parity",
            {"lengths": "64,128"},
            100,
            r"parity\.lengths: \(64, 128\); must be at most 100 here; .*tasks_length",
        ),
        ("recall", {"pairs": "8", "lengths": "16"}, None, r"recall\.lengths: 16; must hold 8 pairs"),
        ("recall", {"pairs": "80"}, None, r"recall\.pairs: 80; must be 1 to half the vocabulary"),
        ("modular_arithmetic", {"modulus": "1"}, None, r"modular_arithmetic\.modulus: 1; must be at least 2"),
        ("s5", {}, None, r"s5\.model\.vocab_size: 119; the 120 elements of the group need 120 tokens"),
    ],
)
def test_what_cannot_be_asked(name: str, settings: dict[str, str], longest: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_task(name, make_task(name, settings), 119, longest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": ""}, r"parity\.lengths: ''"),
        ({"lengths": []}, r"parity\.lengths: \(\); must name lengths"),
        ({"lengths": [8, 8]}, r"parity\.lengths: \(8, 8\); must name lengths of at least 1 token, each once"),
        ({"lengths": [0]}, r"parity\.lengths: \(0,\); must name"),
        ({"rows": 0}, r"parity\.rows: 0; must be at least 1"),
    ],
)
def test_settings_that_ask_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_task("parity", settings)


def test_rows_hold_what_a_model_reads() -> None:
    (row, *_) = make_task("parity", {"lengths": [12], "rows": 2}).examples(Fake(perfect))
    assert isinstance(row, Row)
    assert row.labels.tolist() == (np.cumsum(row.input_ids) % 2).tolist()
