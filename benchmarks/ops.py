"""Times every op against its peers and its floor: `python -m benchmarks.ops [--output NAME] [--only linear_scan]`.

On a CPU the torch forms on one thread, fp32, against time loops and transformers; on a GPU the Triton kernels, bf16,
against flash-linear-attention and torch. Contenders run in alternation, so that whatever else the machine does falls on
all of them; a ratio is the median over rounds of ours to the peer's. Nothing is timed before its output and gradients
agree, at this very shape, with the time loop (on a GPU with the torch form in fp32); a peer that disagrees is named.

The floor is what the op's unavoidable work (benchmarks/work.py) takes at the rates measured in this run: copied bytes,
one large matrix product, exp in cache.

    python -m benchmarks.ops --output benchmarks/results/ops_cpu
    python -m benchmarks.ops --device cuda --rehearse      the GPU's cases on a CPU, tiny, kernels interpreted
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.heading import heading

RESULTS = Path(__file__).parent / "results"

if TYPE_CHECKING:
    from benchmarks.measure import Machine, Row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="whose cases (default: cuda where there is a GPU)")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--rounds", type=int, help="rounds of each case (default: 5 on a CPU, 30 on a GPU)")
    parser.add_argument(
        "--output", type=Path, help="NAME.json and NAME.png; a run of all cases writes benchmarks/results/ops_DEVICE"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes: shows that all cases run, not how fast")
    args = parser.parse_args(argv)
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        if not args.rehearse:
            parser.error("--device cuda: there is no GPU here; --rehearse runs its cases tiny on the CPU")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, at the first call
    if args.output is None and not args.only and not args.rehearse:
        args.output = RESULTS / f"ops_{kind}"
    report(kind, args.only, args.rounds or (5 if kind == "cpu" else 30), args.rehearse, args.output)


def report(kind: str, only: Sequence[str], rounds: int, small: bool, output: Path | None) -> None:
    from benchmarks import cases_cpu, cases_cuda
    from benchmarks.measure import measure, measure_machine

    device = torch.device(kind if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        torch.set_num_threads(1)
    machine = measure_machine(device, small=small)
    print(
        f"copy {machine.copy / 1e9:.1f} GB/s, {machine.dtype} products {machine.flops / 1e12:.3f} TFLOP/s, "
        f"exp {machine.transcendentals / 1e9:.2f} G/s"
    )
    shapes = cases_cuda.REHEARSAL if small else cases_cuda.FULL
    cases = cases_cpu.cases(small) if kind == "cpu" else cases_cuda.cases(device, shapes)
    rows = []
    for case in cases:
        if only and not any(part in case.name for part in only):
            continue
        rows.append(measure(case, machine, device, rounds))
        print(describe(rows[-1]), flush=True)
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps(record(rows, machine), indent=1) + "\n", encoding="utf-8")
        plot(rows, output.with_suffix(".png"))


def describe(row: "Row") -> str:
    lines = [f"{row.case}: {row.ours} agrees to {row.error[row.ours]:.0e}"]
    for what, ms, ratios, floor in (
        ("forward", row.forward_ms, row.forward_ratio, row.forward_floor_ms),
        ("forward + backward", row.both_ms, row.both_ratio, row.both_floor_ms),
    ):
        ours = ms[row.ours]
        peers = "".join(f"; {name} {ms[name]:.3f} ms, ours/theirs {ratio:.3f}" for name, ratio in ratios.items())
        lines.append(f"  {what:18s} {ours:9.3f} ms, {ours / floor:4.1f} times the floor of {floor:.3f} ms{peers}")
    lines.extend(f"  {name} disagrees and is not timed: {what}" for name, what in row.wrong.items())
    return "\n".join(lines)


def record(rows: list["Row"], machine: "Machine") -> dict[str, Any]:
    return {
        **heading(),
        "machine": dataclasses.asdict(machine),
        "results": [dataclasses.asdict(row) for row in rows],
    }


def plot(rows: list["Row"], path: Path) -> None:
    """Forward + backward of every contender as multiples of the floor."""
    from matplotlib.figure import Figure

    bars = [(row, name, ms / row.both_floor_ms) for row in reversed(rows) for name, ms in reversed(row.both_ms.items())]
    figure = Figure(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if name == row.ours else "lightgrey" for row, name, _ in bars]
    drawn = axes.barh([f"{row.case}  {name}" for row, name, _ in bars], [value for *_, value in bars], color=colours)
    axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time / floor, forward + backward (1 = as fast as this machine can)")
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
