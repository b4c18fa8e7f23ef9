import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.plan import FILES
from data.prepare import main
from data.tokenizer import Tokenizer
from tests.data.preparing import ROOT, arguments, assert_same, error_of, wait_for


def test_survives_kills_at_random_moments(inputs: Path, expected: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    generator = random.Random(0)
    command = [sys.executable, "-m", "data.prepare"]

    def start(output: str) -> subprocess.Popen:
        whole = [*command, *arguments(inputs, tmp_path / output, tokenizer, "--workers", "2")]
        return subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start("whole").wait() == 0
    duration = time.monotonic() - began
    for kill in range(4):
        process = start("killed")
        if kill == 0:
            wait_for(tmp_path / "killed" / ".parts" / "tokenizer.model")
        else:
            time.sleep(generator.uniform(0.3, 1.0) * duration)
        process.kill()  # the parent alone: its workers have to notice by themselves
        assert process.wait() == -signal.SIGKILL or kill > 0
    assert start("killed").wait() == 0
    assert_same(tmp_path / "whole", expected)
    assert_same(tmp_path / "killed", expected)


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Kills this process, for good, when it is about to change the directory tree for the step-th time."""
    count = 0
    originals = {name: getattr(os, name) for name in ("link", "rename", "replace", "mkdir", "rmdir", "unlink")}

    def counted(name: str) -> Callable:
        def call(*args, **options):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return originals[name](*args, **options)

        return call

    for name in originals:
        setattr(os, name, counted(name))
    yield


def run_and_die(arguments: list[str], step: int) -> int:
    """Exit status of a forked run that is killed at a step; 0 if it ends before."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        with killed_at(step):
            os._exit(main(arguments))
    return os.waitpid(pid, 0)[1]


def test_survives_a_kill_before_every_change_of_the_tree(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.parts.SMALLEST_PART", 150)
    inputs, expected = tmp_path / "in", tmp_path / "expected"
    inputs.mkdir()
    for index in range(4):
        (inputs / f"{index}.txt").write_text(f"{index} " * 50)
    assert main(arguments(inputs, expected, tokenizer, "--workers", "1")) == 0
    assert main(arguments(inputs, tmp_path / "whole", tokenizer, "--workers", "1", "--shard", "0/1")) == 0
    steps = 0
    for step in range(1, 100):
        directory = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", directory)
        shutil.rmtree(directory / ".parts" / "000001")
        command = arguments(inputs, directory, tokenizer, "--workers", "1")
        status = run_and_die(command, step)
        steps += status != 0
        assert status in (0, signal.SIGKILL)
        assert main(command) == 0
        assert_same(directory, expected)
        shutil.rmtree(directory)
        if status == 0:
            break
    assert steps > 20, steps


def test_run_again_it_checks_the_files(
    inputs: Path, expected: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(expected, tmp_path / "copy")
    before = {name: (tmp_path / "copy" / name).stat().st_ino for name in FILES}
    assert main(arguments(inputs, tmp_path / "copy", tokenizer)) == 0
    assert before == {name: (tmp_path / "copy" / name).stat().st_ino for name in FILES}
    with open(tmp_path / "copy" / "train.bin", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    assert error_of(arguments(inputs, tmp_path / "copy", tokenizer), capsys).startswith(
        f"error: {tmp_path}/copy/train.bin: its sha"
    )


def test_a_full_disk_is_one_line_and_the_run_continues_later(
    inputs: Path, expected: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "data.prepare", *arguments(inputs, tmp_path / "out", tokenizer, "--workers", "1")]

    def run(limit: int) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    failed = run(200_000)  # enough for a part, too little for the merged file
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/out: File too large; ")
    assert failed.stderr.rstrip().endswith("run the same command again to continue")
    assert run(resource.RLIM_INFINITY).returncode == 0
    assert_same(tmp_path / "out", expected)


def test_interrupt_says_how_to_continue(inputs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.prepare", *arguments(inputs, tmp_path / "out", "train:400:unigram")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is started deaf to it
    )
    wait_for(tmp_path / "out" / ".parts" / "plan.json")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted; run the same command again to continue"
