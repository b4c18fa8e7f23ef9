"""The training script as a user runs it: golden losses, resumption, killed ranks, signals, bad input."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import data.prepare
import ops
import train
from models.checkpoint import list_checkpoints, read_meta, read_weights
from tests.forked_train import ForkedTrain

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "tests" / "assets"
TrainOn = Callable[..., ForkedTrain]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paragraphs of LICENSE as documents, under the committed tokenizer."""
    directory = tmp_path_factory.mktemp("corpus")
    paragraphs = [
        " ".join(p.split()) for p in (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n") if p.strip()
    ]
    source = directory / "license.jsonl"
    source.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs), encoding="utf-8")
    arguments = ["--input", str(source), "--tokenizer", str(ASSETS / "tokenizer.model"), "--valid-fraction", "0.1"]
    assert data.prepare.main([*arguments, "--output", str(directory / "corpus")]) == 0
    return directory / "corpus"


def arguments(corpus: Path, runs: Path, *overrides: str) -> list[str]:
    """Of `train.py`."""
    paths = [f"log.directory={runs}", f"data.corpora=[{{path: {corpus}}}]"]
    return [str(ASSETS / "tiny.yaml"), *paths, *overrides]


def command(*of_train: str, ranks: int | None = None, restarts: int = 0) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher += [f"--max-restarts={restarts}"]
    return [sys.executable, *(launcher if ranks else []), "train.py", *of_train]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)


@pytest.fixture
def train_on(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOn:
    """`train_on(runs, *overrides)`: train.py to its end."""

    def to_its_end(runs: Path, *overrides: str) -> ForkedTrain:
        return ForkedTrain(arguments(corpus, runs, *overrides), tmp_path_factory.mktemp("said")).wait(timeout=180)

    return to_its_end


def metrics(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(directory: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm), the last line of a step counting."""
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in metrics(directory) if "loss" in row}


def events(directory: Path) -> list[tuple[str, int]]:
    return [(row["event"], row["step"]) for row in metrics(directory) if "event" in row]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | ForkedTrain, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one whole uninterrupted run in one process, as a user starts it."""
    runs = tmp_path_factory.mktemp("runs")
    done = run(command(*arguments(corpus, runs)))
    assert done.returncode == 0, done.stderr
    return runs / "tiny"


def test_golden_losses(finished: Path) -> None:
    """Ten steps on a committed text. A change of the mathematics regenerates the file in the same commit."""
    golden = json.loads((ASSETS / "golden.json").read_text(encoding="utf-8"))
    found = curve(finished)
    assert sorted(found) == list(range(1, 11))
    for step, (loss, grad_norm) in found.items():
        assert loss == pytest.approx(golden["loss"][step - 1], rel=1e-4), f"loss of step {step}"
        assert grad_norm == pytest.approx(golden["grad_norm"][step - 1], rel=1e-4), f"gradient norm of step {step}"


def test_the_run_directory_explains_itself(finished: Path) -> None:
    assert {"config.yaml", "environment.json", "layers.json", "log.txt", "tokenizer.model"} <= set(os.listdir(finished))
    environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["topology"]["world_size"] == 1
    rows = metrics(finished)
    validations = {row["step"]: row for row in rows if "val_loss" in row}
    assert set(validations) == {5, 10}
    assert validations[10]["val_tokens"] > validations[5]["val_tokens"], "the last validation reads every held-out row"
    assert 0 < validations[10]["val_bits_per_byte"] < 8
    assert [path.name for path in list_checkpoints(finished / "checkpoints")] == ["step_00000005", "step_00000010"]
    assert (finished / "checkpoints" / "latest").resolve().name == "step_00000010"
    over_few = [(row["val_loss"], row["step"]) for row in rows if row.get("val_tokens") == validations[5]["val_tokens"]]
    assert [step for _, step in over_few] == [5, 10], "checkpoints are compared on the same rows"
    best = read_meta(finished / "checkpoints" / "best")
    assert (best["validation"]["loss"], best["step"]) == min(over_few)
    assert read_meta(finished / "checkpoints" / "latest")["progress"]["consumed_samples"] == 80
    assert (finished / "samples" / "step_00000010.txt").read_text(encoding="utf-8").startswith("The ")
    assert events(finished)[0] == ("started", 0)
    assert events(finished)[-1] == ("finished", 10)
    log = (finished / "log.txt").read_text(encoding="utf-8")
    assert "local_attention" in log
    assert "flops_per_token" in log


def test_resuming_equals_not_stopping_to_the_bit(finished: Path, train_on: TrainOn, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(finished, copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints" / "step_00000010")
    done = train_on(tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("resumed", 5) in events(copy)
    assert curve(copy) == curve(finished)
    resumed, uninterrupted = (read_weights(path / "checkpoints" / "step_00000010") for path in (copy, finished))
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    again = train_on(tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(curve(copy)) == 10


def test_so_it_does_with_a_blend_and_whatever_else_the_loop_does(
    corpus: Path, train_on: TrainOn, tmp_path: Path
) -> None:
    """Eight microbatches a step from two corpora, read ahead; the resumed run also validates and samples."""
    blend = f"data.corpora=[{{path: {corpus}, weight: 2.0}}, {{path: {corpus}, weight: 0.7}}]"
    settings = (blend, "data.prefetch=3", "train.micro_batch_size=1", "checkpoint.every=3", "checkpoint.keep_last=9")
    whole = train_on(tmp_path / "whole", *settings, "eval.every=null", "eval.prompts=[]")
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", symlinks=True)
    directories = [tmp_path / name / "tiny" for name in ("whole", "resumed")]
    for path in list_checkpoints(directories[1] / "checkpoints")[1:]:
        shutil.rmtree(path)
    (directories[1] / "metrics.jsonl").unlink()
    resumed = train_on(tmp_path / "resumed", *settings, "eval.every=2")
    assert resumed.returncode == 0, resumed.stderr
    assert ("resumed", 3) in events(directories[1])
    assert sum("val_loss" in row for row in metrics(directories[1])) == 5, "at 4, 6, 8, 10, and all rows at the end"
    expected, found = (curve(directory) for directory in directories)
    assert found == {step: figures for step, figures in expected.items() if step > 3}
    first, second = (read_weights(directory / "checkpoints" / "step_00000010") for directory in directories)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_finished_run_generates_and_exports(finished: Path, tmp_path: Path) -> None:
    """What train.py saved is what the other commands read."""
    arguments = ["-m", "eval.generate", str(finished), "--prompt", "The License", "--max-tokens", "4", "--greedy"]
    generated = run([sys.executable, *arguments])
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("The License")
    exported = run([sys.executable, "-m", "models.hf", "export", str(finished), str(tmp_path / "hf")])
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))["model_type"] == "recurrent_gemma"


def test_a_killed_rank_is_survived(corpus: Path, train_on: TrainOn, tmp_path: Path) -> None:
    """Two ranks, one killed: torchrun restarts them, and the curve is the one of a single undisturbed process."""
    length = ("train.steps=60", "train.micro_batch_size=4", "checkpoint.every=15", "eval.every=null", "eval.prompts=[]")
    on_two = command(*arguments(corpus, tmp_path / "killed", *length), ranks=2, restarts=1)
    process = subprocess.Popen(on_two, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    directory = tmp_path / "killed" / "tiny"
    wait_for(lambda: ("saved", 15) in events(directory), process)
    ranks = psutil.Process(process.pid).children(recursive=True)
    next(p for p in ranks if "train.py" in p.cmdline() and p.environ().get("RANK") == "1").send_signal(signal.SIGKILL)
    assert process.wait(timeout=180) == 0
    names = [name for name, _ in events(directory)]
    assert names.count("started") == names.count("resumed") == 1
    assert names[-1] == "finished"
    whole = train_on(tmp_path / "whole", *length)
    assert whole.returncode == 0, whole.stderr
    found, expected = curve(directory), curve(tmp_path / "whole" / "tiny")
    assert found.keys() == expected.keys()
    # fp32 sums in another order, over 60 steps of a high learning rate
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in range(1, 11))
    assert all(found[step][0] == pytest.approx(expected[step][0], rel=1e-2) for step in expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(
    corpus: Path, train_on: TrainOn, tmp_path: Path, number: signal.Signals
) -> None:
    """Whatever signals come after the first, until the process is gone."""
    settings = ("train.steps=100000", "checkpoint.every=100000", "eval.sequences=1")
    directory = tmp_path / "tiny"
    process = ForkedTrain(arguments(corpus, tmp_path, *settings), tmp_path / "said")
    wait_for(lambda: len(curve(directory)) >= 3, process)
    process.send_signal(number)
    others = itertools.cycle([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        process.send_signal(next(others))
        time.sleep(0.02)
    assert process.returncode == 75
    name, step = events(directory)[-1]
    assert name == "interrupted"
    ending = json.loads((directory / "exit.json").read_text(encoding="utf-8"))
    assert (ending["reason"], ending["detail"], ending["step"]) == ("interrupted", number.name, step)
    assert [read_meta(path)["step"] for path in list_checkpoints(directory / "checkpoints")] == [step]
    if number == signal.SIGTERM:
        resumed = train_on(tmp_path, *settings, f"train.steps={step + 2}")
        assert resumed.returncode == 0, resumed.stderr
        assert events(directory)[-1] == ("finished", step + 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "train.stepz: 3; there is no such key; did you mean steps?"),
        (["train.precision=fp16"], "train.precision: \"fp16\"; must be 'fp32' or 'bf16'"),
        (["model.vocab_size=401"], "model.vocab_size: value 401"),
        (["train.batch_size=6", "train.micro_batch_size=2"], "train.batch_size: value 6; must be a multiple of"),
    ],
)
def test_bad_input_is_one_line_and_builds_nothing(
    corpus: Path, train_on: TrainOn, tmp_path: Path, overrides: list[str], message: str
) -> None:
    """Also on two ranks, and with nothing else on stderr than what torchrun says of the failure."""
    ranks = 2 if "train.batch_size=6" in overrides else None
    if ranks is None:
        done: Any = train_on(tmp_path / "runs", *overrides)
    else:
        done = run(command(*arguments(corpus, tmp_path / "runs", *overrides), ranks=ranks))
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"train.py: {message}")
    if ranks is None:
        assert done.stderr.splitlines() == lines
        assert not done.stdout
    assert not (tmp_path / "runs" / "tiny").exists()


def test_checkpoints_of_another_model_and_broken_ones_are_refused(
    finished: Path, train_on: TrainOn, tmp_path: Path
) -> None:
    resume = f"checkpoint.resume={finished}/checkpoints/latest"
    other = train_on(tmp_path / "a", "model.mixers.local_attention.window=8", resume)
    assert other.returncode == 1
    assert "model.mixers.local_attention.window: 8, but" in other.stderr
    assert "Traceback" not in other.stderr
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".tiny.refused.json"]

    copy = tmp_path / "tiny"
    shutil.copytree(finished, copy, symlinks=True)
    for path in list_checkpoints(copy / "checkpoints"):
        (path / "meta.json").write_text("{}", encoding="utf-8")
    before = (copy / "metrics.jsonl").read_bytes()
    broken = train_on(tmp_path)
    assert broken.returncode == 1
    assert broken.stderr.count("skipped") == 2
    assert "no checkpoint is whole; restore one, or remove the directory" in broken.stderr
    assert (copy / "metrics.jsonl").read_bytes() == before

    for override, message in [
        (
            "checkpoint.resume=none",
            "choose another name, remove the directory, or continue with checkpoint.resume=auto",
        ),
        ("train.steps=8", "train.steps: 8, but"),
    ]:
        refused = train_on(finished.parent, override, "optimizer.schedule.warmup_steps=0")
        assert refused.returncode == 1
        assert message in refused.stderr


def test_a_run_begun_from_another_checkpoint_goes_on_from_its_own(
    finished: Path, train_on: TrainOn, tmp_path: Path
) -> None:
    """`checkpoint.resume=PATH` starts an empty run, and destroys nothing when the command is given again."""
    first = finished / "checkpoints" / "step_00000005"
    branch = ("name=branch", f"checkpoint.resume={first}")
    begun = train_on(tmp_path, *branch, "train.steps=7")
    assert begun.returncode == 0, begun.stderr
    again = train_on(tmp_path, *branch, "train.steps=8")
    assert again.returncode == 0, again.stderr
    resumed = [row for row in metrics(tmp_path / "branch") if row.get("event") == "resumed"]
    assert [row["step"] for row in resumed] == [5, 7]
    assert curve(tmp_path / "branch")[6][0] == pytest.approx(curve(finished)[6][0], rel=1e-6)


def test_logged_steps_tell_how_nonlinear_recurrences_were_solved(train_on: TrainOn, tmp_path: Path) -> None:
    rows = "train.batch_size=1", "train.micro_batch_size=1", "data.sequence_length=512", "eval.every=9"
    layers = "model.layers=[paralstm, paralstm]", "model.mixers={paralstm: {width: 32}}"
    result = train_on(tmp_path, *layers, *rows, "train.steps=3", "log.every=2", "eval.prompts=[]")
    assert result.returncode == 0, result.stderr
    logged = [row for row in metrics(tmp_path / "tiny") if "loss" in row]
    assert [row["step"] for row in logged] == [2, 3]
    for row in logged:
        assert 1 <= row["corrections"] <= 3
        assert 0 <= row["residual"] <= 1e-6
        assert row["sequential_channels"] == 0


@pytest.mark.parametrize("checked", [True, False])
def test_values_are_checked_on_request(
    checked: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decay above 1, where a run would otherwise go on until its loss is no number."""
    x = torch.ones(1, 2, 3)
    monkeypatch.setattr(train, "train", lambda run: ops.linear_scan(x, x) and 0)
    assert train.main(arguments(corpus, tmp_path, f"train.check_values={str(checked).lower()}")) == checked
    assert ("log_decay has a value of 1.0; must be <= 0" in capsys.readouterr().err) == checked
