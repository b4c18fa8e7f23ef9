"""The benchmark runs, reports what it measured, and times nothing that is wrong."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.cases_cpu import cases as cpu_cases
from benchmarks.cases_cuda import REHEARSAL
from benchmarks.cases_cuda import cases as cuda_cases
from benchmarks.measure import Case, Machine, Work, gate, measure
from benchmarks.ops import main
from ops.impl import IMPLEMENTATIONS

MACHINE = Machine(copy=1e9, flops=1e9, transcendentals=1e9, dtype="float32")


def double(x: Tensor) -> Tensor:
    return 2 * x


def case(**contenders: object) -> Case:
    return Case(
        name="double",
        inputs={"x": torch.randn(8)},
        oracle=double,
        contenders=contenders,  # type: ignore[arg-type]
        tolerance=1e-4,
        forward=Work(bytes=64),
        backward=Work(bytes=96),
    )


def test_a_wrong_op_is_not_timed() -> None:
    with pytest.raises(SystemExit, match=r"double: ours is wrong \(output .*, d x .*\); a wrong op is not timed"):
        gate(case(ours=lambda x: 2.001 * x, theirs=double))


def test_a_wrong_gradient_is_not_timed() -> None:
    with pytest.raises(SystemExit, match=r"wrong \(d x .*\)"):
        gate(case(ours=lambda x: x + x.detach()))


def test_a_wrong_peer_is_named_and_left_out() -> None:
    peers = {"right": double, "wrong": lambda x: 3 * x, "broken": lambda x: x / 0}
    row = measure(case(ours=double, **peers), MACHINE, torch.device("cpu"), rounds=3)
    assert row.wrong.keys() == {"wrong", "broken"}
    assert row.both_ms.keys() == row.forward_ms.keys() == {"ours", "right"}
    assert row.both_ratio.keys() == {"right"}


def test_the_floor_is_the_slowest_resource() -> None:
    assert MACHINE.floor(Work(bytes=2e9, flops=1e9)) == 2.0
    assert MACHINE.floor(Work(bytes=1e9, flops=1e9, transcendentals=5e9)) == 5.0


def test_every_op_has_a_case() -> None:
    names = [case.name.split()[0] for case in cuda_cases(torch.device("cpu"), REHEARSAL)]
    assert set(names) == set(IMPLEMENTATIONS)
    names = " ".join(case.name for case in cpu_cases(small=True))
    assert all(
        op in names for op in ("linear_scan", "gated_", "diagonal_lstm", "diagonal_gru", "rglru layer", "attention B2")
    )


@pytest.mark.parametrize(("device", "only"), [("cpu", "rglru"), ("cuda", "rms_norm")])
def test_rehearsal(device: str, only: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "ops"
    main(["--device", device, "--rehearse", "--rounds", "1", "--only", only, "--output", str(output)])
    report = json.loads(output.with_suffix(".json").read_text())
    (row,) = report["results"]
    assert only in row["case"]
    assert not row["wrong"]
    assert len(row["both_ms"]) == 2
    assert all(ms > 0 for ms in row["both_ms"].values())
    assert row["case"] in capsys.readouterr().out
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
