"""Every generated task: labels by brute force from the tokens alone, and what no row can be made of."""

import itertools
from typing import Any

import numpy as np
import pytest

from data.synthetic import NO_TARGET, TASKS, SyntheticRows, find_task

Row = tuple[list[int], list[int]]

OPTIONS: dict[str, list[dict[str, int]]] = {
    "recall": [{"pairs": 3}, {"pairs": 5, "gap": 7}],
    "copying": [{}, {"length": 4}],
    "passkey": [{}, {"digits": 2}],
    "needle": [{}, {"needles": 1}],
    "modular_arithmetic": [{}, {"modulus": 2}],
    "dyck": [{}, {"kinds": 3, "depth": 2}],
}
CASES = [(name, options) for name in TASKS for options in OPTIONS.get(name, [{}])]
GROUPS = {"parity": (2, False), "s3": (3, False), "a5": (5, True), "s5": (5, False)}
LENGTH, VOCAB = 45, 120


def rows_of(name: str, options: dict[str, int], length: int = LENGTH, seed: int = 0) -> SyntheticRows:
    return SyntheticRows(
        f"synthetic:{name}", options, split="train", seed=seed, sequence_length=length, vocab_size=VOCAB
    )


def some(name: str, options: dict[str, int], count: int = 8) -> list[Row]:
    rows = rows_of(name, options)
    return [(rows[i][0].tolist(), rows[i][1].tolist()) for i in range(count)]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_row_is_whole_and_asks_something(name: str, options: dict[str, int]) -> None:
    rows = rows_of(name, options)
    found = np.stack([rows[i] for i in range(8)])
    assert found.dtype == np.int64
    assert found.shape == (8, 3, LENGTH)
    assert (found[:, 2] == np.arange(LENGTH)).all()
    assert 0 <= found[:, 0].min() <= found[:, 0].max() < VOCAB
    assert set(np.unique(found[:, 1])) <= {NO_TARGET, *range(VOCAB)}
    assert (found[:, 1] != NO_TARGET).any(axis=1).all()
    assert len(np.unique(found[:, 0], axis=0)) == 8
    assert not np.array_equal(found[0], rows_of(name, options, seed=1)[0])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_shortest_row_that_passes_can_be_made(name: str, options: dict[str, int]) -> None:
    task = find_task(f"synthetic:{name}", options)

    def passes(length: int) -> bool:
        try:
            task.check(length, VOCAB)
        except ValueError:
            return False
        return True

    shortest = next(length for length in range(1, 60) if passes(length))
    for length in (shortest, shortest + 1):
        assert (rows_of(name, options, length)[0][1] != NO_TARGET).any()


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if TASKS[case[0]].prefix_closed])
def test_what_is_asked_of_a_state_does_not_depend_on_what_follows(name: str, options: dict[str, int]) -> None:
    """The tasks that say so ask at every token that can be asked about, also near the end."""
    step = 2 if name == "modular_arithmetic" else 1
    for _, labels in some(name, options):
        assert [label != NO_TARGET for label in labels] == [t % step == 0 for t in range(LENGTH)]


def permutations(degree: int, even: bool) -> list[tuple[int, ...]]:
    """By the sign of the permutation matrix."""
    identity = np.eye(degree)
    found = itertools.permutations(range(degree))
    return [p for p in found if not even or np.linalg.det(identity[list(p)]) > 0]


@pytest.mark.parametrize("name", GROUPS)
def test_word_problems_by_moving_things_about(name: str) -> None:
    group = permutations(*GROUPS[name])
    assert len(group) == {"parity": 2, "s3": 6, "a5": 60, "s5": 120}[name]
    tokens_seen = set()
    for tokens, labels in some(name, {}):
        places = list(range(GROUPS[name][0]))  # where each thing is
        for token, label in zip(tokens, labels):
            places = [group[token][place] for place in places]
            assert tuple(places) == group[label]
        tokens_seen |= set(tokens)
    assert len(tokens_seen) > 0.9 * min(len(group), 100)


def test_parity_counts_ones() -> None:
    for tokens, labels in some("parity", {}):
        assert labels == [sum(tokens[: t + 1]) % 2 for t in range(LENGTH)]


@pytest.mark.parametrize("options", OPTIONS["modular_arithmetic"])
def test_arithmetic_as_python_does_it(options: dict[str, int]) -> None:
    modulus = options.get("modulus", 5)
    operators = set()
    for tokens, labels in some("modular_arithmetic", options):
        text = "".join(str(token) if token < modulus else "+-*"[token - modulus] for token in tokens)
        operators |= set(text) - set("0123456789")
        for t in range(0, LENGTH, 2):
            assert labels[t] == eval(text[: t + 1]) % modulus
    assert operators == set("+-*")


@pytest.mark.parametrize("options", OPTIONS["dyck"])
def test_brackets_by_striking_out_pairs(options: dict[str, int]) -> None:
    kinds, depth = options.get("kinds", 2), options.get("depth", 4)
    deepest = 0
    for tokens, labels in some("dyck", options):
        letters = "abcdefgh"[: 2 * kinds]
        text = "".join(letters[token] for token in tokens)
        for t, label in enumerate(labels):
            left = text[: t + 1]
            for _ in range(t):
                for kind in range(kinds):
                    left = left.replace(letters[kind] + letters[kinds + kind], "")
            assert set(left) <= set(letters[:kinds]), "what closes has been opened"
            assert label == (kinds + letters.index(left[-1]) if left else 2 * kinds)
            deepest = max(deepest, len(left))
    assert deepest == depth


@pytest.mark.parametrize("options", OPTIONS["recall"])
def test_recall_asks_for_what_was_shown(options: dict[str, int]) -> None:
    shown, gap = 2 * options["pairs"], options.get("gap", 0)
    for tokens, labels in some("recall", options):
        values = dict(zip(tokens[0:shown:2], tokens[1:shown:2]))
        asked = [t for t in range(LENGTH) if labels[t] != NO_TARGET]
        assert asked == list(range(shown + gap, LENGTH, 2))
        assert all(labels[t] == values[tokens[t]] for t in asked)
        assert not set(tokens[shown : shown + gap]) & set(values), "no key stands in the gap"
        assert {tokens[t] for t in asked[: options["pairs"]]} == values.keys()


@pytest.mark.parametrize("options", OPTIONS["copying"])
def test_a_copy_repeats_its_string(options: dict[str, int]) -> None:
    size = options.get("length") or LENGTH // 2
    for tokens, labels in some("copying", options):
        for start in range(0, LENGTH - size, 2 * size + 1):
            assert tokens[start + size] == 0
            string = tokens[start : start + size]
            assert 0 not in string
            assert set(labels[start : start + size]) == {NO_TARGET}
            asked = labels[start + size : start + 2 * size]
            assert asked == string[: len(asked)]


def test_induction_asks_what_followed_the_marker() -> None:
    places = set()
    for tokens, labels in some("induction", {}, count=40):
        (place, last) = [t for t, token in enumerate(tokens) if token == 0]
        assert last == LENGTH - 1
        assert labels == [NO_TARGET] * (LENGTH - 1) + [tokens[place + 1]]
        places.add(place)
    assert min(places) < 5 < LENGTH - 8 < max(places)


@pytest.mark.parametrize("options", OPTIONS["passkey"])
def test_the_passkey_is_said_once(options: dict[str, int]) -> None:
    digits = options.get("digits", 5)
    for tokens, labels in some("passkey", options):
        place, question = tokens.index(10), tokens.index(11)
        assert tokens.count(10) == 1
        assert labels[question:] == tokens[place + 1 : place + 1 + digits]
        assert set(labels[:question]) == {NO_TARGET}
        filler = tokens[:place] + tokens[place + 1 + digits : question]
        assert min(filler) >= 12, "no digit stands anywhere else"


@pytest.mark.parametrize("options", OPTIONS["needle"])
def test_one_needle_has_the_name_asked_for(options: dict[str, int]) -> None:
    for tokens, labels in some("needle", options):
        starts = [t for t, token in enumerate(tokens) if token == 0]
        assert len(starts) == options.get("needles", 4)
        said = {tokens[t + 1]: tokens[t + 2] for t in starts}
        assert len(said) == len(starts)
        assert tokens[-2] == 1
        assert labels == [NO_TARGET] * (LENGTH - 1) + [said[tokens[-1]]]


@pytest.mark.parametrize(("name", "marker"), [("passkey", 10), ("needle", 0)])
def test_depth_goes_from_the_first_thing_said_to_the_last(name: str, marker: int) -> None:
    task: Any = find_task(f"synthetic:{name}", {} if name == "passkey" else {"needles": 1})
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        tokens, _ = task.row_at(np.random.default_rng(0), 401, VOCAB, depth)
        places.append(tokens.tolist().index(marker))
    assert places[0] == 0
    assert all(90 <= after - before <= 105 for before, after in itertools.pairwise(places))
    needles: Any = find_task("synthetic:needle", {"needles": 4})
    for depth, expected in ((0.0, 0), (1.0, LENGTH - 5)):
        tokens = needles.row_at(np.random.default_rng(1), LENGTH, VOCAB, depth)[0].tolist()
        places_of_name = [t for t in range(LENGTH - 1) if tokens[t] == 0 and tokens[t + 1] == tokens[-1]]
        assert places_of_name == [expected]


@pytest.mark.parametrize(
    ("name", "options", "length", "vocab_size", "message"),
    [
        ("recall", {"gap": -1}, 45, 120, r"data\.options\.gap: -1; must be at least 0"),
        ("recall", {"pairs": 4, "gap": 10}, 19, 120, r"data\.sequence_length: 19; must hold 4 pairs, the gap"),
        ("copying", {"length": 8}, 8, 120, r"data\.sequence_length: 8; .* take 9 tokens; lengthen it"),
        ("copying", {}, 8, 2, r"model\.vocab_size: 2; .* need 3 tokens; raise it to at least 3"),
        ("induction", {}, 2, 120, r"data\.sequence_length: 2; "),
        ("passkey", {"digits": 0}, 45, 120, r"data\.options\.digits: 0; must be at least 1"),
        ("passkey", {}, 10, 120, r"data\.sequence_length: 10; .* take 11 tokens"),
        ("passkey", {}, 45, 12, r"model\.vocab_size: 12; .* need 13 tokens"),
        ("needle", {"needles": 20}, 100, 81, r"model\.vocab_size: 81; .* need 82 tokens"),
        ("needle", {}, 13, 120, r"data\.sequence_length: 13; 4 needles and the question take 14 tokens"),
        ("a5", {}, 45, 59, r"model\.vocab_size: 59; the 60 elements of the group need 60 tokens"),
        ("modular_arithmetic", {"modulus": 1}, 45, 120, r"data\.options\.modulus: 1; must be at least 2"),
        ("modular_arithmetic", {}, 45, 7, r"model\.vocab_size: 7; .* need 8 tokens"),
        ("dyck", {"depth": 0}, 45, 120, r"data\.options\.depth: 0; must be at least 1"),
        ("dyck", {"kinds": 3}, 45, 6, r"model\.vocab_size: 6; .* need 7 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, options: dict[str, int], length: int, vocab_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SyntheticRows(
            f"synthetic:{name}", options, split="train", seed=0, sequence_length=length, vocab_size=vocab_size
        )


def test_a_task_without_settings_says_so() -> None:
    with pytest.raises(ValueError, match=r"^options: \['length'\]; synthetic:parity has none; remove the others"):
        find_task("synthetic:parity", {"length": 3})
