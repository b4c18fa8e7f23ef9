"""The variables of the batch scripts: what they cannot be is said, with the way out, before anything is started."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from training.variables import VARIABLES, complaints, main, refused

ROOT = Path(__file__).resolve().parents[2]


def never(command: Sequence[str]) -> str | None:
    raise AssertionError(f"tried {command}")


def nothing_against(command: Sequence[str]) -> str | None:
    return None


@pytest.mark.parametrize(
    ("script", "name", "value", "must"),
    [
        ("train", "RANKS_PER_NODE", "two", "a whole number from 1"),
        ("train", "RANKS_PER_NODE", "0", "a whole number from 1"),
        ("train", "RANKS_PER_NODE", "8x", "a whole number from 1"),
        ("train", "RANKS_PER_NODE", "010", "without leading zeros"),
        ("train", "RANKS_PER_NODE", " 8", "a whole number from 1"),
        ("train", "RENDEZVOUS_PORT", "65536", "a port from 1 to 65535"),
        ("train", "RENDEZVOUS_HOST", "n..0", "a host that this one knows"),
        ("train", "PREFLIGHT", "no", "0 or 1"),
        ("train", "ON_CPU", "yes", "0 or 1"),
        ("train", "LEAST_BANDWIDTH", "40GB", "GB/s, as 40 or 12.5"),
        ("train", "MAX_CRASHES", "-1", "a whole number from 0"),
        ("train", "MAX_STANDSTILL", "-1", "a whole number from 0"),
        ("train", "MAX_STANDSTILL", "many", "a whole number from 0"),
        ("train", "OMP_NUM_THREADS", "all", "a whole number from 1"),
        ("prepare", "WORKERS", "0", "a whole number from 1"),
        ("prepare", "MERGE", "false", "0 or 1"),
        ("eval", "RESULTS", "nowhere/results.json", "a file in a directory that exists"),
        ("eval", "RESULTS", str(ROOT), "a file in a directory that exists"),
        ("eval", "EVALUATE", "--tasks a\n--limit 3", "one line"),
        ("train", "EVALUATE", "--tasks a\n--limit 3", "one line"),
    ],
)
def test_a_wrong_value_is_named_with_the_way_out(script: str, name: str, value: str, must: str) -> None:
    (found,) = complaints(script, {name: value}, never)
    assert found.startswith(f"{name}: {value!r}; must be ")
    assert must in found
    assert "; unset it for " in found or "; put its options into one" in found


def test_right_values_and_none_are_let_through() -> None:
    right = {
        "train": {
            "RANKS_PER_NODE": "8",
            "RENDEZVOUS_HOST": "127.0.0.1",
            "RENDEZVOUS_PORT": "29500",
            "PREFLIGHT": "0",
            "ON_CPU": "1",
            "LEAST_BANDWIDTH": "12.5",
            "MAX_STANDSTILL": "0",
            "MAX_CRASHES": "0",
            "OMP_NUM_THREADS": "10",
        },
        "prepare": {"WORKERS": "16", "MERGE": "0"},
        "eval": {"RESULTS": "results.json"},
    }
    assert right.keys() == VARIABLES.keys()
    for script, variables in right.items():
        assert variables.keys() == VARIABLES[script].keys()
        assert complaints(script, variables, never) == []
        assert complaints(script, {}, never) == []
        assert complaints(script, dict.fromkeys(variables, ""), never) == [], "the shell takes nothing for not set"


def test_a_variable_of_another_script_does_not_matter() -> None:
    assert complaints("prepare", {"RANKS_PER_NODE": "two", "EVALUATE": "a\nb", "RESULTS": "/no/x"}, never) == []


def test_all_that_is_wrong_is_said_at_once() -> None:
    found = complaints("train", {"RANKS_PER_NODE": "two", "PREFLIGHT": "2"}, never)
    assert [line.split(":")[0] for line in found] == ["RANKS_PER_NODE", "PREFLIGHT"]


def test_evaluations_are_tried_out_as_they_will_be_asked_for() -> None:
    tried = []

    def note(command: Sequence[str]) -> str | None:
        tried.append(list(command))
        return None

    given = {"EVALUATE": "--tasks a,b  --limit 3", "EVALUATE_WITH": "--gpus=1 -p long"}
    assert complaints("train", given, note) == []
    assert tried == [
        [sys.executable, "-m", "eval", "RUN", "--check", "--tasks", "a,b", "--limit", "3"],
        ["sbatch", "--test-only", "--gpus=1", "-p", "long", "slurm/eval.sbatch", "RUN"],
    ]


def test_evaluations_that_cannot_be_are_refused() -> None:
    def both(command: Sequence[str]) -> str | None:
        return "usage: eval\nerror: no a" if "eval" in command else "error: no gpus\nallocation failure"

    given = {"EVALUATE": "--tasks a", "EVALUATE_WITH": "--gpus=1"}
    tasks, options = complaints("train", given, both)
    assert tasks.startswith("EVALUATE: '--tasks a'; must be options of python -m eval (error: no a); mend it")
    assert options.startswith("EVALUATE_WITH: '--gpus=1'; must be options with which sbatch takes slurm/eval.sbatch")
    assert "(error: no gpus allocation failure); mend it, or unset EVALUATE" in options
    (found,) = complaints("train", {"EVALUATE_WITH": "--gpus=1"}, never)
    assert "which EVALUATE='--tasks A,B' asks for; set that too, or unset it" in found
    (found,) = complaints("train", {"EVALUATE": "--tasks a", "RESULTS": "x.json"}, nothing_against)
    assert found.startswith("RESULTS: 'x.json'; every evaluation would write there")


def test_a_job_that_was_requeued_tries_no_evaluation_again() -> None:
    """Its partition may be down for the moment; training need not wait for that."""
    given = {"EVALUATE": "--tasks a", "SLURM_RESTART_COUNT": "1"}
    assert complaints("train", given, never) == []
    assert len(complaints("train", given | {"PREFLIGHT": "no"}, never)) == 1


def test_what_a_command_says_is_what_it_has_against_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    alone = "import os, sys; sys.exit(os.environ.get('SLURM_JOB_ID'))"
    assert refused([sys.executable, "-c", alone]) is None
    assert refused([sys.executable, "-c", "import sys; sys.exit('not so')"]) == "not so"
    assert refused([sys.executable, "-c", "import sys; sys.exit(3)"]) == "exit status 3"
    assert "no/such/command" in (refused(["no/such/command"]) or "")


def test_the_command_ends_with_2_and_a_line_for_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*VARIABLES["prepare"], "EVALUATE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["prepare"]) == 0
    monkeypatch.setenv("WORKERS", "some")
    monkeypatch.setenv("MERGE", "yes")
    assert main(["prepare"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line[:25] for line in said] == ["prepare.sbatch: WORKERS: ", "prepare.sbatch: MERGE: 'y"]


def test_each_script_names_its_variables() -> None:
    for script, variables in VARIABLES.items():
        header = (ROOT / "slurm" / f"{script}.sbatch").read_text().split("#SBATCH")[0]
        for name in variables:
            assert f"\n#   {name} " in header, f"{script}.sbatch does not name {name}"
