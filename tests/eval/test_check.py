"""`python -m eval --check`: tasks and options are looked at, and no model is needed for it."""

import re
from pathlib import Path

import pytest

from eval.__main__ import main

TEXT = ("--set", f"bits_per_byte.path={__file__}")


def test_tasks_are_checked_before_there_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "run"), "--check", "--tasks", "bits_per_byte,passkey,recall", *TEXT]) == 0
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--tasks", "bits_per_byte"], 1, r"eval: bits_per_byte\.path: missing"),
        (["--tasks", "bits_per_byte", "--set", "bits_per_byte.path=/nowhere"], 1, r"path: '/nowhere'; must be a file"),
        (["--tasks", "recall", "--set", "recall.rows=0"], 1, r"recall\.rows: 0; must be at least 1"),
        (["--tasks", "bits_per_byte", *TEXT, "another/run"], 2, "unrecognized arguments: another/run"),
        (["--tasks", "bits_per_byte", *TEXT, "--limit", "0"], 2, "--limit: 0; must be at least 1"),
        (["--list"], 2, "MODEL and --tasks are needed"),
        ([], 2, "MODEL and --tasks are needed"),
    ],
)
def test_what_no_model_could_be_asked_is_refused(
    options: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found: object = main(["runs/not_yet", "--check", *options])
    except SystemExit as left:
        found = left.code
    assert found == status
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
