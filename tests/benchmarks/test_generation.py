"""The generation benchmark on a text too short to measure anything: what it prints and writes."""

import json
from pathlib import Path

import pytest

from benchmarks.generation import STACKS, main


def test_every_stack_is_measured_at_every_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "generation.json"
    sizes = ["--width", "16", "--depth", "3", "--window", "4", "--rounds", "2", "--device", "cpu"]
    main(["--contexts", "8", "32", *sizes, "--output", str(output)])
    figures = {(row["stack"], row["context"]): row for row in json.loads(output.read_text())["figures"]}
    assert figures.keys() == {(stack, context) for stack in STACKS for context in (8, 32)}
    for stack in STACKS:
        short, long = figures[stack, 8], figures[stack, 32]
        grows = long["state_bytes"] > short["state_bytes"]
        assert grows == (stack == "attention"), stack
        assert short["over_shortest"] == 1.0
        assert min(short["step_ms"], long["step_ms"], long["prefill_s"]) > 0
    assert figures["attention", 32]["over_attention"] == 1.0
    assert capsys.readouterr().out.count("x attention") == 2 * len(STACKS)


def test_bad_usage() -> None:
    for arguments in (["--contexts", "0"], ["--rounds", "0"], ["--width", "100"]):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 2
