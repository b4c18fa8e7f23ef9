"""How gated_delta_rule's Triton kernels are launched, and that each one's part in the result is tested."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ops import Layout
from ops.gated_delta_rule import triton as tier
from ops.gated_delta_rule import triton_backward, triton_forward
from tests.ops.compare import SLOW, assert_equal, evaluate, packed_positions
from tests.ops.test_gated_delta_rule_triton import make_inputs, rule, triton_rule


class Recorder:
    """In a kernel's place: keeps how it is launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((grid, options))


KERNELS = [
    *((triton_forward, f"{name}_kernel") for name in ("solve", "states", "outputs")),
    *((triton_backward, f"{name}_kernel") for name in ("adjoint", "pairs", "keys", "decays")),
]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The launches of a forward and a backward of 70,000 rows, without data."""
    recorder = Recorder()
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, recorder)
    shape = (70_000, 1, 1)
    q, gates = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((*shape, 128), shape))
    o, state, *saved = tier.forward._init_fn(q, q, q, gates, gates, None, None, 1.0)
    tier.backward._init_fn(o, state, q, q, q, gates, gates, None, 1.0, saved)
    assert len(recorder.launches) == len(KERNELS)
    return recorder


def test_grid_limits_above_65535(recorded: Recorder) -> None:
    """flash-linear-attention PR 1077: only a grid's first axis may exceed 65535."""
    assert all(len(grid) == 1 and grid[0] >= 70_000 for grid, _ in recorded.launches)


def test_warps_on_hopper(recorded: Recorder) -> None:
    """flash-linear-attention #640, #984: wrong gradients from products of more than one warp group."""
    assert all(options["num_warps"] <= 4 for _, options in recorded.launches)


Spoil = Callable[[list[Any], dict[str, Any]], None]


def zeros(index: int) -> Spoil:
    """The kernel's result, argument `index`, is lost."""
    return lambda args, options: args[index].zero_()


def without_documents(args: list[Any], options: dict[str, Any]) -> None:
    options["HAS_POSITIONS"] = False


MUTANTS: dict[str, tuple[Any, str, Spoil | None, Spoil | None]] = {
    "reset in the inverse and the carried decays": (triton_forward, "solve_kernel", without_documents, None),
    "reset in the scores": (triton_forward, "outputs_kernel", without_documents, None),
    "reset in the gradients of pairs": (triton_backward, "pairs_kernel", without_documents, None),
    "carried state": (triton_forward, "solve_kernel", None, zeros(5)),
    "gradient of the final state": (triton_backward, "adjoint_kernel", lambda args, _: args[1].zero_(), None),
    "gradient of the scores": (triton_backward, "pairs_kernel", None, zeros(9)),
    "gradient of the inverse": (triton_backward, "pairs_kernel", None, zeros(10)),
    "log decays inside a chunk": (triton_backward, "pairs_kernel", None, zeros(11)),
    "beta inside a chunk": (triton_backward, "pairs_kernel", None, zeros(12)),
    "sums over keys": (triton_backward, "keys_kernel", None, zeros(13)),
    "log decays through a chunk": (triton_backward, "keys_kernel", None, lambda args, _: args[13][..., 3, :].zero_()),
}


@pytest.mark.parametrize("mutant", [pytest.param(name, marks=SLOW if i % 2 else ()) for i, name in enumerate(MUTANTS)])
def test_each_dropped_term_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, before, after = MUTANTS[mutant]
    kernel = getattr(module, name)

    class Mutant:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                if before is not None:
                    before(list(args), options)
                kernel[grid](*args, **options)
                if after is not None:
                    after(list(args), options)

            return launch

    inputs, layout = make_inputs(36), Layout(packed_positions(36, first=3, cuts=(23,))[:1])
    expected = evaluate(rule, inputs, layout=layout, impl="reference")
    monkeypatch.setattr(module, name, Mutant())
    with pytest.raises(AssertionError):
        assert_equal(evaluate(triton_rule, inputs, layout=layout), expected, 1e-3)


def test_the_mutants_input_passes_unspoilt() -> None:
    inputs, layout = make_inputs(36), Layout(packed_positions(36, first=3, cuts=(23,))[:1])
    assert_equal(
        evaluate(triton_rule, inputs, layout=layout), evaluate(rule, inputs, layout=layout, impl="reference"), 2e-6
    )
