"""The study of known results: its claims, what it found, that it goes on where it was and, slowly, that they hold."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import eval.study
from configs.schema import load_config
from eval.study import CLAIMS, CONFIGS, Claim, main, report
from tests.eval.recorded import training_row, write_metrics

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "benchmarks" / "results" / "study_cpu.json"
PARITY = [CONFIGS / f"parity_{name}.yaml" for name in ("gated_deltanet", "paralstm", "rglru", "hgrn2")]


def results(**values: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {run: [{"metrics": {"accuracy_64": value}} for value in found] for run, found in values.items()}


@pytest.mark.parametrize(
    ("claim", "found", "holds"),
    [
        (Claim("a", "accuracy_64", least=0.9), results(a=[0.95, 0.91]), True),
        (Claim("a", "accuracy_64", least=0.9), results(a=[1.0, 0.89]), False),
        (Claim("a", "accuracy_64", most=0.6), results(a=[0.5, 0.61]), False),
        (Claim("a", "accuracy_64", most=0.6), results(b=[0.5]), None),
        (Claim("a", "accuracy_64", least=0.3, above="b"), results(a=[0.9, 0.8], b=[0.5, 0.4]), True),
        (Claim("a", "accuracy_64", least=0.3, above="b"), results(a=[0.9, 0.7], b=[0.5, 0.4]), False),
        (Claim("a", "accuracy_64", least=0.3, above="b"), results(a=[0.9], b=[]), None),
    ],
)
def test_a_claim_holds_at_every_seed(claim: Claim, found: Any, holds: bool | None) -> None:
    assert claim.holds(found) is holds


def test_claims_are_of_runs_and_metrics_that_there_are() -> None:
    runs = {path.stem: load_config(path) for path in CONFIGS.glob("*.yaml")}
    assert all(name == run.name for name, run in runs.items())
    assert {claim.run for claim in CLAIMS} | {claim.above for claim in CLAIMS} - {None} == set(runs)
    for claim in CLAIMS:
        ((task, options),) = runs[claim.run].eval.task_options.items()
        assert (task,) == runs[claim.run].eval.tasks
        assert runs[claim.run].data.source == f"synthetic:{task}"
        assert int(claim.metric.removeprefix("accuracy_")) in options["lengths"]


def test_runs_that_are_compared_have_equal_width_rows_and_steps() -> None:
    for task in ("parity", "recall"):
        runs = [load_config(path) for path in CONFIGS.glob(f"{task}_*.yaml")]
        assert len({(run.model.width, str(run.data), str(run.eval)) for run in runs}) == 1
        assert len({run.train for run in runs}) == 1
        if task == "recall":
            assert len({(run.model.mlp, run.optimizer, len(run.model.layers)) for run in runs}) == 1


def test_every_claim_held_when_it_was_tried() -> None:
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    assert {len(seeds) for seeds in found["runs"].values()} == {len(found["seeds"])} == {3}
    assert [claim for claim in CLAIMS if not claim.holds(found["runs"])] == []
    for path in CONFIGS.glob("*.yaml"):
        run = load_config(path)
        for result in found["runs"][run.name]:
            assert result["parameters"] == run.model.num_params(), "tried on the run as it stands"
            assert (result["steps"], result["layers"]) == (run.train.steps, list(run.model.layers))


def test_the_page_shows_what_was_found() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for part in report(json.loads(FOUND.read_text(encoding="utf-8"))).split("\n\n"):
        assert part in page


def finish(directory: Path, accuracy: float, reason: str = "finished") -> None:
    write_metrics(directory, [training_row(500), {"step": 500, "task/parity/accuracy_64": accuracy}])
    (directory / "layers.json").write_text("[]")
    (directory / "config.yaml").write_text("")
    environment = {"git_revision": "abc", "device": "cpu", "python": "3", "packages": {}}
    (directory / "environment.json").write_text(json.dumps(environment))
    (directory / "exit.json").write_text(json.dumps({"reason": reason}))


def test_finished_runs_are_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(tmp_path / "parity_rglru-seed0", 0.5)
    finish(tmp_path / "parity_rglru-seed4", 0.5, reason="interrupted")
    trained: list[list[str]] = []

    def train(command: list[str], **settings: Any) -> Any:
        trained.append(command)
        finish(tmp_path / "parity_rglru-seed4", 0.55)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", train)
    output = tmp_path / "found.json"
    run = CONFIGS / "parity_rglru.yaml"
    arguments = [str(run), "--seeds", "0", "4", "--directory", str(tmp_path), "--output", str(output)]
    assert main(arguments) == 0
    assert len(trained) == 1
    settings = {"name=parity_rglru-seed4", "train.seed=4", "data.seed=4", f"log.directory={tmp_path}"}
    assert set(trained[0]) == {sys.executable, "train.py", str(run), *settings}
    assert [result["seed"] for result in json.loads(output.read_text())["runs"]["parity_rglru"]] == [0, 4]
    assert "| parity_rglru | " in capsys.readouterr().out
    assert main(["--table", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "0.525 (0.500 to 0.550) |" in printed
    assert "parity_rglru: accuracy_64 at most 0.6: holds" in printed
    assert "parity_hgrn2: accuracy_64 at most 0.6: not tried" in printed


def test_a_claim_that_does_not_hold_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(tmp_path / "parity_rglru-seed0", 0.7)
    arguments = [str(CONFIGS / "parity_rglru.yaml"), "--seeds", "0", "--directory", str(tmp_path)]
    assert main([*arguments, "--output", str(tmp_path / "found.json")]) == 1
    assert "accuracy_64 at most 0.6: DOES NOT HOLD" in capsys.readouterr().out


def test_what_cannot_be_studied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = str(CONFIGS / "parity_rglru.yaml"), ["--output", str(tmp_path / "found.json")]
    assert main([run, "--output", str(tmp_path / "no" / "such.json")]) == 1
    assert "--output: " in capsys.readouterr().err
    assert main([str(ROOT / "configs" / "debug_rglru.yaml"), *output]) == 1
    assert "eval.tasks: []; a run of a study asks one task" in capsys.readouterr().err
    failed = SimpleNamespace(returncode=1, stderr="train.py: no such thing")
    monkeypatch.setattr(eval.study.subprocess, "run", lambda *_, **__: failed)
    assert main([run, "--seeds", "3", "--directory", str(tmp_path), *output]) == 1
    assert "parity_rglru-seed3: train.py ended with 1: train.py: no such thing" in capsys.readouterr().err


@pytest.mark.slow
def test_both_sides_of_parity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained as a user trains them."""
    runs, output = [str(path) for path in PARITY], tmp_path / "found.json"
    assert main([*runs, "--seeds", "0", "--directory", str(tmp_path), "--output", str(output)]) == 0
    found = json.loads(output.read_text())["runs"]
    assert [claim.holds(found) for claim in CLAIMS if claim.run in found] == [True] * 4
    for learner in ("parity_gated_deltanet", "parity_paralstm"):
        assert found[learner][0]["metrics"]["accuracy_16"] == 1.0
