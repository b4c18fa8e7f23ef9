"""Every Triton kernel compiles for an H100 that need not be there: the interpreter accepts more than the compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = ("linear_scan", "gated_linear_attention", "gated_delta_rule", "diagonal_lstm", "diagonal_gru", "causal_conv1d")


def compiled(only: str, output: Path) -> list[dict[str, Any]]:
    """What the command lists, from a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_kernels", "--only", only, "--output", str(output)]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    return json.loads(output.read_text())


def test_loss_kernels_load_16_bytes_and_spill_nothing(tmp_path: Path) -> None:
    kernels = compiled("linear_cross_entropy", tmp_path / "kernels.json")
    assert {entry["kernel"] for entry in kernels} == {"_summarise_kernel", "_gradient_kernel"}
    for entry in kernels:
        assert entry["spill"] == 0
        assert entry["registers"] <= 80, "three programs of 256 threads an SM"
        assert entry["wide_loads"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("op", [*OPS, "rms_norm"])
def test_kernels_compile(op: str, tmp_path: Path) -> None:
    kernels = compiled(op, tmp_path / "kernels.json")
    assert len(kernels) >= 2, "forward and backward"
    assert all(0 < entry["registers"] <= 255 for entry in kernels)
