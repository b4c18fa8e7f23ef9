"""Loss beyond the trained length: a collapse is told from a hard text, and every token is asked for once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.synthetic import NO_TARGET
from data.tokenizer import Tokenizer
from eval.tasks import check_task, make_task
from eval.tasks.length_extrapolation import LengthExtrapolation
from tests.eval.tasks.fakes import Fake

ROOT = Path(__file__).resolve().parents[3]
LICENSE = str(ROOT / "LICENSE")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ROOT / "tests" / "assets" / "tokenizer.model")


def task(**settings: Any) -> LengthExtrapolation:
    values = {"path": LICENSE, "trained_length": 16, "length": 128, "rows": 3} | settings
    return make_task("length_extrapolation", values)  # type: ignore[return-value]


@pytest.mark.parametrize("trained_length", [16, 17, 100, 127])
def test_windows_ask_for_every_token_beyond_once(trained_length: int, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))
    stretches = task(trained_length=trained_length).examples(Fake(lambda row, t: 1.0, tokenizer=tokenizer))
    assert [token for stretch in stretches for token in stretch.whole.labels] == tokens[: 3 * 128]
    for number, (whole, windows) in enumerate(stretches):
        assert whole.input_ids.tolist() == [tokenizer.bos_id, *tokens[number * 128 : (number + 1) * 128 - 1]]
        asked = [label for row, _ in windows for label in row.labels if label != NO_TARGET]
        assert asked == whole.labels[trained_length:].tolist()
        for row, first in windows:
            before = int((row.labels != NO_TARGET).argmax())
            assert len(row.input_ids) <= trained_length
            assert before == trained_length // 2, "half a window of context at least"
            assert row.labels[before] == whole.labels[first]
            assert row.input_ids[0] == tokenizer.bos_id
            assert row.input_ids[1:].tolist() == whole.labels[first - before :][: len(row.input_ids) - 1].tolist()


def test_a_state_that_collapses_has_an_excess(tokenizer: Tokenizer) -> None:
    """Two nats more from token 64 of a row on, and a text whose later half is hard for everybody."""
    found = task(rows=1).evaluate(Fake(lambda row, t: 1.0 + 2.0 * (t >= 64), tokenizer=tokenizer))
    assert found["excess"] == pytest.approx(2.0 * 64 / 112)
    assert found["excess_at_end"] == pytest.approx(2.0)
    assert found["loss_within"] == 1.0
    assert found["loss_beyond"] == pytest.approx(1.0 + 128 / 112)
    assert found["loss_of_windows"] == 1.0
    first = [bucket[:2] for bucket in found["loss_by_position"]]
    assert first == [[0, 1], [1, 2], [2, 4], [4, 8], [8, 16], [16, 32], [32, 64], [64, 128]]
    assert [bucket[2] for bucket in found["loss_by_position"]] == [1.0] * 7 + [3.0]
    assert [bucket[3] for bucket in found["loss_by_position"]] == [None] * 5 + [1.0] * 3
    tokens = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))[:128]
    hard = set(tokens[64:]) - set(tokens[:64])
    harder = task(rows=1).evaluate(Fake(lambda row, t: 1.0 + 2.0 * (row.labels[t] in hard), tokenizer=tokenizer))
    assert harder["loss_by_position"][-1][2] > 1.2
    assert harder["excess"] == harder["excess_at_end"] == 0.0


def test_context_that_serves_has_none(tokenizer: Tokenizer) -> None:
    found = task(trained_length=24).evaluate(Fake(lambda row, t: 1 / (1 + t), tokenizer=tokenizer))
    assert found["rows"] == 3
    assert found["excess_at_end"] < found["excess"] < 0
    assert [24, 32] in [bucket[:2] for bucket in found["loss_by_position"]], "the trained length is a border"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 16}, r"length: 16; must exceed trained_length \(16\)"),
        ({"trained_length": 1}, r"trained_length: 1; must be at least 2"),
        ({"rows": 0}, r"rows: 0; must be at least 1"),
        ({"length": 256}, r"length: 256; must be at most 200 here; .*eval\.tasks_length"),
        ({"path": "no/such"}, r"path: 'no/such'; must be a file"),
    ],
)
def test_what_cannot_be_asked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^length_extrapolation\\.{message}"):
        check_task("length_extrapolation", task(**settings), 400, 200)


def test_a_text_that_fills_no_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^length: 128; .* has \d+ tokens; shorten it or add text"):
        task(path=str(tmp_path)).examples(Fake(lambda row, t: 1.0, tokenizer=tokenizer))


def test_files_follow_one_another(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name} " * 20, encoding="utf-8")
    found = task(path=str(tmp_path), trained_length=8, length=64).examples(
        Fake(lambda row, t: 1.0, tokenizer=tokenizer)
    )
    both = tokenizer.encode("a.txt " * 20) + tokenizer.encode("b.txt " * 20)
    assert np.concatenate([stretch.whole.labels for stretch in found]).tolist() == both[: 64 * len(found)]
    assert len(found) >= 2
