"""What scripts ask of a configuration before anything is allocated."""

from pathlib import Path

import pytest

from configs.schema import dump_config, load_config
from configs.show import main

CONFIG = "configs/demo.yaml"


def test_it_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([CONFIG, "train.seed=7", "optimizer.lr=1e-4"]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip() == dump_config(load_config(CONFIG, ["train.seed=7", "optimizer.lr=1e-4"])).rstrip()
    (tmp_path / "again.yaml").write_text(printed)
    assert load_config(tmp_path / "again.yaml", []) == load_config(CONFIG, ["train.seed=7", "optimizer.lr=1e-4"])


def test_it_prints_the_run_directory_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CONFIG, "log.directory=elsewhere", "--directory"]) == 0
    assert capsys.readouterr().out == "elsewhere/demo\n"


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        ("3", ["parallel.tensor=2"], "parallel.tensor"),
        ("64", [], "train.batch_size: value"),
        ("2", ["train.micro_batch_size=0"], "train.micro_batch_size"),
        ("2", ["model.depth=3"], "depth"),
    ],
)
def test_what_does_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str], ranks: str, overrides: list[str], message: str
) -> None:
    assert main([CONFIG, *overrides, "--ranks", ranks]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_what_fits_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CONFIG, "--ranks", "2", "--directory"]) == 0


START = ["configs/debug_rglru.yaml", "--check"]


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (7, ["parallel.tensor=7"], "parallel.tensor: 7; "),
        (50, ["parallel.pipeline=50"], "parallel.pipeline: 50"),
        (5, ["parallel.sequence=5"], "parallel.sequence: 5; "),
        (1, ["eval.tasks=[nonsense]"], "nonsense"),
        (1, ["checkpoint.resume=nowhere/step_00000001"], "nowhere/step_00000001"),
        (1, ["--hardware", "H100", "--gpu-memory", "0.001"], "parallel: 1 GPUs: the run takes "),
        (1, ["--hardware", "V100"], "--hardware: 'V100'; must be one of"),
    ],
)
def test_what_a_start_refuses_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ranks: int, overrides: list[str], message: str
) -> None:
    batch = ["train.batch_size=16", "train.micro_batch_size=1", f"log.directory={tmp_path}", "--ranks", str(ranks)]
    assert main([*START, *batch, *overrides]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_kernels_and_a_compiler_of_another_machine_may_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    asked = ["model.impl.linear_scan=triton", "parallel.compile=true"]
    assert main([*START, f"log.directory={tmp_path}", "--ranks", "1", *asked]) == 0


def test_all_that_a_start_refuses_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = ["data.sequence_length=32", "eval.prompts=[]", f"log.directory={tmp_path}", "--ranks", "2", "--check"]
    assert main([CONFIG, *sizes, f"data.corpora.0.path={tmp_path}/nowhere"]) == 1
    assert f"{tmp_path}/nowhere" in capsys.readouterr().err
    assert main(["configs/debug_rglru.yaml", f"log.directory={tmp_path}", "--ranks", "1", "--check"]) == 0
    assert list(tmp_path.iterdir()) == []
