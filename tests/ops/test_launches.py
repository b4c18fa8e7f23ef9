"""What holds of the host code of every op and every kernel: it waits for no device and fits every grid, and what is
compiled depends on the sizes of features alone.

The ops run, forward and backward, on tensors without numbers (the meta device), where whoever reads a value (item,
tolist, bool, cpu, nonzero) gets an error, and no GPU is needed; kernels are not launched but written down.
"""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

import ops
from ops import Layout
from ops.impl import IMPLEMENTATIONS
from tests.ops.compare import packed_positions

WIDTH = 32
SHORT, LONG, MANY = (2, 70), (2, 1000), (70_000, 3)
Op = Callable[..., Any]


class Calls:
    """Of each op that has kernels, on B rows of T tokens."""

    def __init__(self, batch: int, time: int, *, device: str = "meta") -> None:
        self.batch, self.time, self.device = batch, time, device
        self.layout = Layout(packed_positions(time, first=3)[:1].to(device).expand(batch, time))

    def run(self, op: str, impl: str) -> Any:
        return getattr(self, op)(impl=impl)

    def numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, requires_grad=True)

    def tokens(self, *shape: int) -> Tensor:
        return self.numbers(self.batch, self.time, *shape)

    def recurrence(self, op: Op, *inputs: Tensor, state: tuple[int, ...], **options: Any) -> Any:
        initial = self.numbers(self.batch, *state)
        return op(*inputs, layout=self.layout, initial_state=initial, output_final_state=True, **options)

    def causal_conv1d(self, **options: Any) -> Any:
        inputs = self.tokens(WIDTH), self.numbers(WIDTH, 4)
        return self.recurrence(ops.causal_conv1d, *inputs, state=(3, WIDTH), **options)

    def diagonal_gru(self, **options: Any) -> Any:
        inputs = self.tokens(3, WIDTH), self.numbers(3, WIDTH)
        return self.recurrence(ops.diagonal_gru, *inputs, state=(1, WIDTH), segments=2, **options)

    def diagonal_lstm(self, **options: Any) -> Any:
        inputs = self.tokens(3, WIDTH), self.numbers(3, WIDTH), self.numbers(2, WIDTH)
        return self.recurrence(ops.diagonal_lstm, *inputs, state=(2, WIDTH), segments=2, **options)

    def gated_delta_rule(self, **options: Any) -> Any:
        inputs = *(self.tokens(3, WIDTH) for _ in range(3)), self.tokens(3), self.tokens(3)
        return self.recurrence(ops.gated_delta_rule, *inputs, state=(3, WIDTH, WIDTH), **options)

    def gated_linear_attention(self, **options: Any) -> Any:
        inputs = (self.tokens(3, WIDTH) for _ in range(4))
        return self.recurrence(ops.gated_linear_attention, *inputs, state=(3, WIDTH, WIDTH), **options)

    def linear_cross_entropy(self, **options: Any) -> Any:
        labels = torch.zeros(self.batch, self.time, dtype=torch.int64, device=self.device)
        return ops.linear_cross_entropy(self.tokens(WIDTH), self.numbers(50, WIDTH), labels, **options)

    def linear_scan(self, **options: Any) -> Any:
        return self.recurrence(ops.linear_scan, self.tokens(WIDTH), self.tokens(WIDTH), state=(WIDTH,), **options)

    def rms_norm(self, **options: Any) -> Any:
        return ops.rms_norm(self.tokens(WIDTH), self.numbers(WIDTH), gate=self.tokens(WIDTH), **options)

    def rotary(self, **options: Any) -> Any:
        return ops.rotary(self.tokens(3, WIDTH), self.layout.positions, **options)


ROOT = Path(ops.__file__).parent
WITH_PRODUCTS = ("gated_delta_rule", "gated_linear_attention")
WITH_KERNELS = [op for op, names in IMPLEMENTATIONS.items() if "triton" in names]
# Corrections of the torch form stop when they are small enough, which the host has to see; kernels see it themselves.
READS = [("diagonal_gru", "chunked"), ("diagonal_lstm", "chunked")]
CASES = [
    (op, impl)
    for op in WITH_KERNELS
    for impl in ("chunked", "triton")
    if impl in IMPLEMENTATIONS[op] and (op, impl) not in READS
]


class WithoutFakes(TorchDispatchMode):
    """Runs this repository's registered ops themselves where their fakes would stand in for them, and counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "rondo":
            return func(*args, **(kwargs or {}))
        self.count += 1
        with self:  # a mode is off while it handles an op
            return OPDEFS[func.name().split(".")[0]]._init_fn(*args, **(kwargs or {}))


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    num_warps: int
    compiled: dict[str, Any]
    """Constants, and of the integers that Triton looks at what it sees: whether they are 1 or divisible by 16."""

    @classmethod
    def of(cls, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> "Launch":
        signature = inspect.signature(kernel.fn)
        given = {name: z for name, z in options.items() if name in signature.parameters}
        launch = {name: z for name, z in options.items() if name not in given}
        kept = kernel.kwargs.get("do_not_specialize") if hasattr(kernel, "kwargs") else kernel.do_not_specialize
        bound = signature.bind(*args, **given)
        bound.apply_defaults()
        compiled = dict(launch)
        for name, value in bound.arguments.items():
            if signature.parameters[name].annotation is tl.constexpr:
                compiled[name] = value
            elif isinstance(value, int) and name not in (kept or ()):
                compiled[name] = (value == 1, value % 16 == 0)
        return cls(kernel.fn.__name__, grid, launch.get("num_warps", 4), compiled)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Of the kernels, in order. They do not run."""
    found: list[Launch] = []

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: found.append(Launch.of(kernel, grid, args, options))

    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # or a GPU would be asked for
    return found


def forward_and_backward(op: str, impl: str, size: tuple[int, int]) -> tuple[int, int]:
    """How many registered ops ran in each direction."""
    with WithoutFakes() as mode:
        result = Calls(*size).run(op, impl)
        forward = mode.count
        sum(z.sum() for z in (result if isinstance(result, tuple) else (result,))).backward()
    return forward, mode.count - forward


@pytest.mark.parametrize(("op", "impl"), CASES)
def test_nothing_is_read_from_the_device(op: str, impl: str, launches: list[Launch]) -> None:
    forward, backward = forward_and_backward(op, impl, SHORT)
    if impl == "triton":
        assert forward > 0 < backward
        assert launches
    else:
        assert not launches


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, bool, Tensor.cpu, Tensor.nonzero, int])
def test_reading_is_caught(read: Callable[..., Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)), WithoutFakes():
        read(torch.zeros((), device="meta"))


@pytest.mark.parametrize(("op", "impl"), READS)
def test_forms_that_read_do(op: str, impl: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        forward_and_backward(op, impl, SHORT)


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_grid_limits_beyond_65535(op: str, launches: list[Launch]) -> None:
    """Only a grid's first axis may be longer."""
    forward_and_backward(op, "triton", MANY)
    assert launches
    assert all(len(launch.grid) == 1 for launch in launches), launches


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_num_warps_on_hopper(op: str, launches: list[Launch]) -> None:
    """Products of eight warps went wrong in other projects; kernels without products may have them."""
    if op in WITH_PRODUCTS:
        forward_and_backward(op, "triton", LONG)
        assert launches
        assert all(launch.num_warps <= 4 for launch in launches), launches
    else:
        folders = ["diagonal_cell", op] if op.startswith("diagonal") else [op]
        sources = [path for folder in folders for path in (ROOT / folder).glob("triton*.py")]
        assert sources
        assert not any("dot(" in path.read_text(encoding="utf-8") for path in sources)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/triton*.py")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_reverse_associative_scan_and_autotune_are_not_used(path: Path) -> None:
    """Triton's issue 4362: scans with reverse=True gave wrong results."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("associative_scan", "autotune", "heuristics")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cumsum":
            assert not any(keyword.arg == "reverse" for keyword in node.keywords)


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_no_kernel_is_compiled_for_a_number_of_tokens(op: str, launches: list[Launch]) -> None:
    """Any batches and lengths run the same kernels (of a width divisible by 16, as the strides of rows then are), and
    nothing is tuned."""
    compiled = []
    for size in (SHORT, LONG, MANY, (1, 1), (16, 64)):
        launches.clear()
        forward_and_backward(op, "triton", size)
        compiled.append({launch.kernel: launch.compiled for launch in launches})
    for kernel in set().union(*compiled):
        forms = [forms[kernel] for forms in compiled if kernel in forms]
        assert all(form == forms[0] for form in forms), (kernel, forms)
