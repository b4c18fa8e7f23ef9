"""Tasks by name and settings, from a command line's texts and from a YAML's values."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from eval.tasks import TASKS, check_task, make_task


@dataclass(frozen=True, kw_only=True)
class Example:
    generates: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False

    lengths: tuple[int, ...]
    share: float = 0.5
    limit: int | None = None
    text: str = ""
    deep: bool = False

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError(f"share: {self.share}; must be at most 1")

    def check(self, vocab_size: int, longest: int | None) -> None:
        if longest is not None and max(self.lengths) > longest:
            raise ValueError(f"lengths: {self.lengths}; must be at most {longest}")


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "example", Example)


@pytest.mark.parametrize(
    "settings",
    [
        {"lengths": "8,16", "share": "0.25", "limit": "none", "text": "7", "deep": "true"},
        {"lengths": [8, 16], "share": 0.25, "limit": None, "text": "7", "deep": True},
    ],
)
def test_texts_and_values_make_the_same_task(settings: dict[str, Any]) -> None:
    assert make_task("example", settings) == Example(lengths=(8, 16), share=0.25, limit=None, text="7", deep=True)


def test_whole_numbers_are_numbers() -> None:
    assert make_task("example", {"lengths": "8", "share": 1, "limit": "3"}) == Example(lengths=(8,), share=1.0, limit=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"example\.lengths: missing; it has no default: give example\.lengths=VALUE"),
        ({"lengths": "8", "shaer": "1"}, r"example\.shaer: there is no such setting; did you mean share\?"),
        ({"lengths": "8", "zzz": "1"}, r"example\.zzz: there is no such setting; it has lengths, share, limit"),
        ({"lengths": "8,x"}, r"example\.lengths: 'x'; must be a whole number"),
        ({"lengths": 8}, r"example\.lengths: 8; must be a list"),
        ({"lengths": "8", "share": "much"}, r"example\.share: 'much'; must be a number"),
        ({"lengths": "8", "limit": 2.5}, r"example\.limit: 2\.5; must be a whole number"),
        ({"lengths": "8", "limit": True}, r"example\.limit: True; must be a whole number"),
        ({"lengths": "8", "deep": "perhaps"}, r"example\.deep: 'perhaps'; must be true or false"),
        ({"lengths": "8", "share": "2"}, r"example\.share: 2\.0; must be at most 1"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_task("example", settings)


def test_a_check_names_the_task() -> None:
    with pytest.raises(ValueError, match=r"^example\.lengths: \(8, 16\); must be at most 9"):
        check_task("example", make_task("example", {"lengths": "8,16"}), 100, 9)


def test_unknown_names_show_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"^tasks: 'multiple_choise'; there is no such task; did you mean multiple_choice"
    ):
        make_task("multiple_choise", {})
    with pytest.raises(ValueError, match=r"there is no such task; python -m eval --list shows all"):
        make_task("qqqq", {})


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_needs(name: str) -> None:
    """What the loop asks a task before anything is built."""
    kind = TASKS[name]
    assert isinstance(kind.generates, bool)
    assert isinstance(kind.reads_text, bool)
    assert (kind.__doc__ or "").strip(), "shown by --list"
    assert all(callable(getattr(kind, method)) for method in ("check", "examples", "evaluate"))
