"""Compiles every Triton kernel for a GPU that need not be there: `python -m benchmarks.compile_kernels [--only scan]`.

Triton brings its own assembler, so that what no interpreter shows can be seen on any machine: that a kernel compiles at
all, how many registers a thread takes, what spills to memory, how much shared memory a program holds. Each op runs once
forward and backward at the head dims of real models on tensors of a few tokens; every kernel launch is compiled, listed
and not run. Registers are of a thread: a block of W warps needs 32 W of them each, and an SM has 65,536.

Exits with 1 if a kernel does not compile or spills more than --max-spill bytes.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import ops.impl

MAX_SPILL = 400
"""Of a thread, in bytes: what the best configuration found for the largest kernel (gated linear attention's gradients)
spills, 5 % of its instructions; less spilling, it has fewer programs on an SM or more work."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel in one specialisation; shared memory in bytes of a program, spills in bytes of a thread, and loads of
    16 bytes in the code, asynchronous ones among them."""

    op: str
    kernel: str
    constants: str
    warps: int
    registers: int
    shared: int
    spill: int
    wide_loads: int


class Assembler:
    """A driver of a GPU that is not there: it knows its architecture, and nothing is ever launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(op: str, capability: int, found: list[Compiled]) -> Iterator[None]:
    """While active, launching a kernel compiles it and appends what came of it to `found`."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        constants = ", ".join(f"{key}={shown(value)}" for key, value in options.items() if key.isupper())
        entry = Compiled(op, self._fn_name.rsplit(".", 1)[-1], constants, kernel.metadata.num_warps, *resources(kernel))
        if entry not in found:
            found.append(entry)
        return kernel

    driver = SimpleNamespace(active=Assembler(capability))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton.runtime.jit, "driver", driver),
        mock.patch.object(triton.compiler.compiler, "driver", driver),
        mock.patch.object(ops.impl, "_obstacle", return_value=None),
    ):
        yield


def shown(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def resources(kernel: Any) -> tuple[int, int, int, int]:
    """The last four fields of `Compiled`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    wide = re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\S* .*0x10", kernel.asm["ptx"])
    return registers, kernel.metadata.shared, stack, len(wide)


def calls(only: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(op, a function that runs its kernels forward and backward), at the widths of the GPU benchmark on few tokens."""
    from benchmarks import cases_cuda
    from benchmarks.measure import gradients

    for case in cases_cuda.cases(torch.device("cpu"), cases_cuda.FEW_TOKENS):
        if "triton" in case.contenders and (not only or any(part in case.name for part in only)):
            run = case.contenders["triton"]
            yield case.name, lambda case=case, run=run: gradients(run, case.inputs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability (default: 90, H100 and H200)")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument(
        "--max-spill", type=int, default=MAX_SPILL, help="bytes a thread may spill (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="where to write the list as JSON")
    args = parser.parse_args(argv)
    found: list[Compiled] = []
    failures = []
    for name, run in calls(args.only):
        first = len(found)
        try:
            with compiling(name, args.capability, found):
                run()
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            print(failures[-1], file=sys.stderr)
        for entry in found[first:]:
            print(
                f"{entry.op:48s} {entry.kernel:34s} warps {entry.warps}  registers {entry.registers:3d}  "
                f"shared {entry.shared:6d}  spilled {entry.spill:4d}  wide loads {entry.wide_loads:3d}  "
                f"{entry.constants}",
                flush=True,
            )
    if args.output is not None:
        args.output.write_text(json.dumps([dataclasses.asdict(entry) for entry in found], indent=1) + "\n")
    spilling = [
        f"{entry.op}: {entry.kernel} spills {entry.spill} bytes" for entry in found if entry.spill > args.max_spill
    ]
    print("\n".join([f"{len(found)} kernels compiled for sm_{args.capability}", *spilling]))
    return 1 if failures or spilling else 0


if __name__ == "__main__":
    sys.exit(main())
