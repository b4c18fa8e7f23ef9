"""What the tests of data.prepare share."""

import filecmp
import time
from pathlib import Path

import pytest

import data.prepare
from data.plan import FILES
from data.prepare import main
from data.tokenizer import Tokenizer

ROOT = Path(data.prepare.__file__).parent.parent


def arguments(inputs: Path, output: Path, tokenizer: Tokenizer | str = "train:400", *more: str) -> list[str]:
    model = tokenizer if isinstance(tokenizer, str) else str(tokenizer.path)
    return ["--input", f"{inputs}/*", "--tokenizer", model, "--output", str(output), "--valid-fraction", "0.2", *more]


def assert_same(output: Path, expected: Path) -> None:
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    assert filecmp.cmpfiles(output, expected, FILES, shallow=False) == (list(FILES), [], [])


def error_of(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line a failing command prints after its progress."""
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1
    return captured.err[captured.err.index("error: ") :].rstrip("\n")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
