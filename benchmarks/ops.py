"""Times every recurrence's parallel form against its time loop: `python -m benchmarks.ops [--output FILE]`.

Forward and backward, alternating, so that whatever else the machine does falls on both; the report is the median over
rounds of the ratio of one round. An op is timed only after its outputs and gradients agree with the loop's.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import diagonal_lstm, gated_delta_rule, gated_linear_attention, linear_scan
from training.environment import describe_environment

TOLERANCE = 1e-4
"""Relative RMS between the two forms in fp32, outputs and gradients."""


def cases() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """name -> (op, inputs)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def decay(*shape: int) -> Tensor:
        return -torch.rand(*shape, generator=generator).mul(0.2)

    def keys(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(randn(*shape), dim=-1)

    head = (2, 2048, 4, 64)
    return {
        "linear_scan B4 T2048 D512": (linear_scan, [randn(4, 2048, 512), decay(4, 2048, 512)]),
        "gated_linear_attention B2 T2048 H4 K64 V64": (
            gated_linear_attention,
            [randn(*head), randn(*head), randn(*head), decay(*head)],
        ),
        "gated_delta_rule B2 T2048 H4 K64 V64": (
            gated_delta_rule,
            [randn(*head), keys(*head), randn(*head), decay(*head[:3]), torch.rand(head[:3], generator=generator)],
        ),
        "diagonal_lstm B4 T2048 D256": (
            diagonal_lstm,
            [randn(4, 2048, 3, 256), 0.3 * randn(3, 256), 0.3 * randn(2, 256)],
        ),
    }


def run(op: Callable[..., Any], inputs: list[Tensor], impl: str) -> tuple[float, list[Tensor]]:
    """Seconds of a forward and backward pass, and the output with all gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    start = time.perf_counter()
    y, _ = op(*leaves, impl=impl)
    y.square().mean().backward()
    if y.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def disagreement(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for name, (op, tensors) in cases().items():
        inputs = [tensor.to(device) for tensor in tensors]
        error = disagreement(run(op, inputs, "chunked")[1], run(op, inputs, "reference")[1])
        if error > TOLERANCE:
            raise SystemExit(f"{name}: chunked and reference differ by {error:.1e}; a wrong op is not timed")
        pairs = [(run(op, inputs, "chunked")[0], run(op, inputs, "reference")[0]) for _ in range(args.rounds)]
        rows.append(
            {
                "case": name,
                "chunked_ms": 1e3 * statistics.median(ours for ours, _ in pairs),
                "reference_ms": 1e3 * statistics.median(theirs for _, theirs in pairs),
                "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
                "disagreement": error,
            }
        )
        print("{case:45s} {chunked_ms:9.1f} ms  loop {reference_ms:9.1f} ms  ratio {ratio:.3f}".format(**rows[-1]))
    if args.output is not None:
        environment = describe_environment({"world_size": 1})
        kept = {key: environment[key] for key in ("python", "platform", "packages", "device", "cuda", "git_revision")}
        date = datetime.date.today().isoformat()
        args.output.write_text(json.dumps({"date": date, **kept, "results": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
