"""The loader's benchmark measures what it says, in processes of their own, and keeps corpora where it is told to."""

import json
from pathlib import Path

import pytest

from benchmarks.loader import LENGTH, ROWS, main


def test_a_start_and_a_resume_are_measured_and_written(tmp_path: Path) -> None:
    output = tmp_path / "loader.json"
    arguments = ["--rounds", "1", "--resume", "640", "--directory", str(tmp_path), "--output", str(output)]
    main(["--tokens", "10000", *arguments])
    record = json.loads(output.read_text())
    start, resume = record["figures"]
    assert (start["tokens"], start["documents"], start["consumed_samples"]) == (10_000, 10, 0)
    assert resume["consumed_samples"] == 640
    for figures in (start, resume):
        assert figures["tokens_per_second"] * figures["step_ms"] / 1e3 == pytest.approx(ROWS * LENGTH)
        assert min(figures["check_ms"], figures["first_step_ms"], figures["peak_mb"]) > 0
    assert (tmp_path / "10000.idx").exists()
