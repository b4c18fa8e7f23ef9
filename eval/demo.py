"""The whole main job, once: corpus, training on two ranks, a killed rank, resume, report, samples, export, reload.

    python -m eval.demo                                  about ten minutes on two cores
    python -m eval.demo --overrides train.steps=100      a shorter one: the proof of learning may fail

Every step is a command that a user would type; this script types them, and checks what came of it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from configs.schema import ConfigError, RunConfig, load_config
from data.loader import validation_batches
from eval.ablate import without_recurrent_state
from eval.load import load
from eval.validate import Validation, validate

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2

MAX_BITS_PER_BYTE = 2.15
MIN_BITS_LOST_WITHOUT_STATE = 0.1
MIN_NATS_GAINED_BY_CONTEXT = 0.05
ABLATION_SEQUENCES = 128

PROMPT = "def read(self, path):"
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
print(type(model).__name__, "continues:")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=48, do_sample=False)[0], skip_special_tokens=True))
"""
"""What a machine without Rondo runs on the exported model."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", help="the run (default: %(default)s)")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key.sub=value", help="passed on to train.py")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    start = time.monotonic()
    try:
        run = load_config(args.config, args.overrides)
        name = free_name(run)
        arguments = [args.config, *args.overrides, f"name={name}"]
        summary = demonstrate(load_config(args.config, arguments[1:]), arguments)
    except (ConfigError, DemoError, subprocess.CalledProcessError) as error:
        print(f"eval.demo: {error}", file=sys.stderr)
        return 1
    print(summary + f"\nThe whole took {(time.monotonic() - start) / 60:.1f} minutes.")
    return 0


class DemoError(RuntimeError):
    """The demonstration did not show what it should."""


def demonstrate(run: RunConfig, arguments: list[str]) -> str:
    """All steps in order; returns the closing summary. `arguments` are train.py's."""
    python = os.path.relpath(sys.executable)
    directory, corpus, export = run.directory, run.data.corpora[0].path, run.directory / "huggingface"
    with step("1 of 7: tokenizer and corpus from the Python standard library's source"):
        command(
            "-m",
            "data.prepare",
            "--input",
            "python-stdlib",
            "--tokenizer",
            f"train:{run.model.vocab_size}",
            "--output",
            corpus,
        )
    with step(f"2 of 7: training on {RANKS} ranks; one of them is killed half way, and the run resumes by itself"):
        began = time.monotonic()
        train_and_kill(run, arguments, kill_at=run.train.steps // 2)
        training_minutes = (time.monotonic() - began) / 60
    with step("3 of 7: what the model has learned"):
        proof, lines = prove(run)
        print("\n".join(lines))
    with step("4 of 7: report"):
        command("-m", "eval.report", str(directory))
    with step("5 of 7: samples through the recurrent state"):
        command("-m", "eval.generate", str(directory), "--prompt", PROMPT, "--max-tokens", "64", "--seed", "1")
    with step("6 of 7: export to transformers"):
        command("-m", "models.hf", "export", str(directory), str(export))
    with step("7 of 7: reload in a process without Rondo"), tempfile.TemporaryDirectory() as elsewhere:
        subprocess.run([sys.executable, "-I", "-c", RELOAD, str(export.resolve()), PROMPT], cwd=elsewhere, check=True)
    if not proof:
        raise DemoError("the model did not learn what the demo promises; see step 3")
    return "\n".join(
        [
            "",
            *lines,
            f"Training took {training_minutes:.1f} minutes, the killed rank and the resumption included.",
            "",
            f"Run        {directory}",
            f"Report     {directory / 'report.html'}",
            f"Exported   {export}   (transformers.AutoModelForCausalLM.from_pretrained)",
            "",
            "Next:",
            f"  {python} -m eval.generate {directory} --prompt 'class Tree:'",
            f"  {python} -m data.prepare --input 'texts/*.txt' --tokenizer train:4096 --output data/corpora/mine",
            f"  {python} train.py configs/demo.yaml name=mine data.corpora.0.path=data/corpora/mine",
        ]
    )


def free_name(run: RunConfig) -> str:
    """`demo`, or `demo-2`, ... where earlier ones are kept."""
    names = [run.name, *(f"{run.name}-{i}" for i in range(2, 1000))]
    return next(name for name in names if not (Path(run.log.directory) / name).exists())


@contextmanager
def step(title: str) -> Iterator[None]:
    print(f"\n=== {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"--- {time.monotonic() - start:.0f} s", flush=True)


def command(*arguments: str) -> None:
    """Runs `python ARGUMENTS` and shows it; raises CalledProcessError if it fails."""
    print("$ python " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


def train_and_kill(run: RunConfig, arguments: list[str], *, kill_at: int) -> None:
    """Trains under torchrun, kills rank 1 with SIGKILL once step `kill_at` is logged, and waits for the end."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "1"]
    print("$ python -m " + " ".join([*torchrun, "train.py", *arguments]), flush=True)
    process = subprocess.Popen([sys.executable, "-m", *torchrun, "train.py", *arguments])
    killer = threading.Thread(target=kill_rank, args=(process, run.directory / "metrics.jsonl", kill_at), daemon=True)
    killer.start()
    if process.wait() != 0:
        raise DemoError(f"training ended with exit code {process.returncode}; its messages are above")
    killer.join()
    events = [row for row in read_jsonl(run.directory / "metrics.jsonl") if "event" in row]
    resumed = [row["step"] for row in events if row["event"] == "resumed"]
    if not resumed or not 0 < resumed[0] <= kill_at:
        raise DemoError(f"the run should have resumed from a checkpoint before step {kill_at}; it resumed at {resumed}")
    if events[-1]["event"] != "finished":
        raise DemoError(f"the run should have finished; its last event is {events[-1]}")


def kill_rank(launcher: subprocess.Popen, metrics: Path, kill_at: int) -> None:
    """Waits for step `kill_at` and kills the process of rank 1, as an out-of-memory killer would."""
    while launcher.poll() is None:
        if any(row["step"] >= kill_at for row in read_jsonl(metrics)):
            ranks = psutil.Process(launcher.pid).children(recursive=True)
            victim = next(p for p in ranks if "train.py" in p.cmdline() and p.environ().get("RANK") == "1")
            print(f"\n*** SIGKILL to rank 1, process {victim.pid}, after step {kill_at}", flush=True)
            victim.send_signal(signal.SIGKILL)
            return
        time.sleep(0.2)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may still be growing, none where there is no file."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def prove(run: RunConfig) -> tuple[bool, list[str]]:
    """Whether the trained model compresses held-out text, uses its context, and needs its state; and the figures."""
    rows = [row for row in read_jsonl(run.directory / "metrics.jsonl") if "val_loss" in row]
    bits = rows[-1]["val_bits_per_byte"]
    by_position = {first: nats for first, _, nats in rows[-1]["val_loss_by_position"]}
    early, late = by_position[8], by_position[128]
    gained = early - late
    whole, forgetful = (held_out_loss(run, forget=forget) for forget in (False, True))
    assert whole.bits_per_byte is not None
    assert forgetful.bits_per_byte is not None
    lost = forgetful.bits_per_byte - whole.bits_per_byte
    good = [bits <= MAX_BITS_PER_BYTE, gained >= MIN_NATS_GAINED_BY_CONTEXT, lost >= MIN_BITS_LOST_WITHOUT_STATE]
    lines = [
        f"held-out bits per byte: {bits:.3f} (wanted: at most {MAX_BITS_PER_BYTE})",
        (
            f"nats a token at positions 8 to 15: {early:.3f}, from 128 on: {late:.3f}, gained by context: {gained:.3f} "
            f"(wanted: at least {MIN_NATS_GAINED_BY_CONTEXT})"
        ),
        (
            f"bits per byte with recurrent state: {whole.bits_per_byte:.3f}, zeroed at every token: "
            f"{forgetful.bits_per_byte:.3f}, lost: {lost:.3f} (wanted: at least {MIN_BITS_LOST_WITHOUT_STATE})"
        ),
    ]
    return all(good), [("ok    " if held else "FAIL  ") + line for held, line in zip(good, lines, strict=True)]


def held_out_loss(run: RunConfig, *, forget: bool) -> Validation:
    """Loss of the newest checkpoint on some held-out rows, with or without the state of its recurrent layers."""
    model, tokenizer = load(run.directory)
    with without_recurrent_state(model) if forget else nullcontext(), torch.no_grad():
        return validate(
            lambda batch: model(batch.input_ids, batch.positions, batch.labels)[0],
            validation_batches(run.data, micro_batch_size=16, dp_rank=0, dp_size=1, max_sequences=ABLATION_SEQUENCES),
            sequence_length=run.data.sequence_length,
            tokenizer=tokenizer,
        )


if __name__ == "__main__":
    sys.exit(main())
