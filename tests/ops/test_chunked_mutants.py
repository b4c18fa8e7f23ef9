"""The torch forms of linear_scan, gated_linear_attention and gated_delta_rule with one term dropped fail the comparison
with the time loop. Dropped resets are in the files of the ops, the diagonal cells' terms in test_diagonal_cell.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import Layout
from ops.gated_delta_rule import chunked as delta
from ops.gated_linear_attention import chunked as attention
from ops.linear_scan import chunked as scan
from tests.ops import test_gated_delta_rule, test_gated_linear_attention, test_linear_scan
from tests.ops.compare import error, evaluate, packed_positions

TIME = 100
OPS: dict[Any, tuple[Any, Any]] = {
    scan: (test_linear_scan.scan, test_linear_scan.make_inputs),
    attention: (test_gated_linear_attention.gla, test_gated_linear_attention.make_inputs),
    delta: (test_gated_delta_rule.rule, test_gated_delta_rule.make_inputs),
}
Mutate = Callable[[Any], Any]


def argument(index: int) -> Mutate:
    """The function sees zeros in place of an argument."""
    return lambda real: lambda *z, **options: real(*z[:index], torch.zeros_like(z[index]), *z[index + 1 :], **options)


def result(index: int) -> Mutate:
    """The function returns zeros in place of a result."""

    def mutate(real: Any) -> Any:
        def mutant(*arguments: Any, **options: Any) -> list[Tensor]:
            results = list(real(*arguments, **options))
            results[index] = torch.zeros_like(results[index])
            return results

        return mutant

    return mutate


def one_direction(reverse: bool) -> Mutate:
    """What enters a chunk is lost on the way forward or back."""

    def mutate(real: Any) -> Any:
        def mutant(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
            entries, last = real(*arguments, **options)
            return entries.zero_() if options.get("reverse", False) == reverse else entries, last

        return mutant

    return mutate


MUTANTS: list[tuple[Any, str, Mutate, str]] = [
    (scan, "_summaries", result(0), "output"),  # the state carried from chunk to chunk
    (scan, "_summaries", result(1), "output"),  # the decay of a chunk
    (scan, "forward", argument(2), "output"),  # the initial state
    (scan, "backward", argument(1), "d x"),  # the gradient of the last state
    (scan, "backward", argument(3), "d log_decay"),  # the states that decays act on
    (scan, "backward", argument(4), "d log_decay"),  # the initial one of them
    (attention, "_carry", one_direction(reverse=False), "output"),
    (attention, "_carry", one_direction(reverse=True), "d k"),
    (attention, "forward", argument(4), "output"),
    (attention, "backward", argument(1), "d v"),
    (attention, "_merge_backward", argument(2), "d q"),  # pairs inside a chunk
    (attention, "_merge_backward", argument(3), "d q"),  # queries that read the state
    (attention, "_merge_backward", argument(4), "d k"),  # keys that feed it
    (attention, "_merge_backward", argument(5), "d log_decay"),  # decays through a chunk
    (delta, "_write", result(1), "output"),
    (delta, "forward", argument(5), "output"),
    (delta, "backward", argument(1), "d v"),
    (delta, "_write_backward", argument(2), "d initial_state"),  # what a chunk's reads take away from its state
    (delta, "_write_backward", argument(3), "d v"),  # writes into the next chunk
    (delta, "log_decay_gradient", argument(0), "d log_decay"),
    (delta, "log_decay_gradient", argument(1), "d log_decay"),
    (delta, "log_decay_gradient", argument(2), "d log_decay"),
    (delta, "log_decay_gradient", argument(3), "d log_decay"),
]


def errors(op: Any) -> dict[str, float]:
    function, make_inputs = OPS[op]
    inputs, layout = make_inputs(TIME), Layout(packed_positions(TIME, first=3, cuts=(70,)))
    expected = evaluate(function, inputs, layout=layout, impl="reference")
    found = evaluate(function, inputs, layout=layout, impl="chunked")
    return {name: error(found[name], expected[name]) for name in expected}


@pytest.mark.parametrize("op", OPS)
def test_nothing_dropped(op: Any) -> None:
    assert max(errors(op).values()) <= 1e-12


@pytest.mark.parametrize(("op", "name", "mutate", "wrong"), MUTANTS)
def test_a_dropped_term_is_caught(
    op: Any, name: str, mutate: Mutate, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the result that the term is for."""
    monkeypatch.setattr(op, name, mutate(getattr(op, name)))
    assert errors(op)[wrong] > 1e-3
