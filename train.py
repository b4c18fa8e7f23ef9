"""Trains a language model as one YAML describes it.

torchrun --nproc-per-node 2 train.py configs/demo.yaml train.steps=100
python train.py configs/demo.yaml                    one process
"""

import argparse
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch

from configs.same_run import refuse_other_model, refuse_other_run
from configs.schema import ConfigError, RunConfig, config_as_dict, dump_config, load_config
from data.corpus import check_data
from data.loader import Loader, check_batch, validation_batches
from data.tokenizer import Tokenizer
from eval.generate import sample_text
from eval.validate import validate
from models.checkpoint import CheckpointError, read_meta, verify
from models.lm import LM
from ops import checked_values
from parallel.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from parallel.engine import Engine, StepResult
from parallel.grid import Grid, everywhere, init_distributed
from parallel.partition import build_model
from training.environment import describe_environment, peak_flops
from training.log import RunLog, format_table
from training.metrics import module_metrics
from training.schedule import learning_rate

T = TypeVar("T")


class RunError(ValueError):
    """The run cannot start or go on, for a reason that every rank knows."""


def agreed(grid: Grid, action: Callable[[], T]) -> T:
    """What `action`, which must not communicate, returns; RunError on every rank if it fails on any. Collective."""
    try:
        return everywhere(grid, action, ValueError)
    except ValueError as error:
        raise RunError(error) from error


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can finish its step, save and leave."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces one value of the YAML")
    args = parser.parse_args(argv)
    try:
        run = load_config(args.config, args.overrides)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a machine read the same file and fail alike
            print(f"train.py: {error}", file=sys.stderr)
        return 1
    try:
        with checked_values() if run.train.check_values else nullcontext():
            train(run)
    except (RunError, CheckpointError) as error:  # raised alike on every rank
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"train.py: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return 1
    return 0


def train(run: RunConfig) -> None:
    stop_signal = StopSignal()
    ranks = init_distributed(run.parallel.timeout_minutes)
    grid = agreed(ranks, lambda: ranks.arranged(sequence=run.parallel.sequence, tensor=run.parallel.tensor))
    tokenizer_path = agreed(grid, lambda: check_run(run, grid))
    model, blueprint, partition = agreed(
        grid, lambda: build_model(run.model, grid, seed=run.train.seed, sequence_length=run.data.sequence_length)
    )
    checkpoint, progress = choose_start(run, grid, tokenizer_path)
    first_step = progress["step"]
    agreed(grid, lambda: make_directory(run))
    loader = Loader(
        run.data,
        split="train",
        batch_size=run.train.batch_size,
        micro_batch_size=run.train.micro_batch_size,
        dp_rank=grid.dp_rank,
        dp_size=grid.dp_size,
        vocab_size=run.model.vocab_size,
    )
    engine = Engine(
        model,
        grid=grid,
        parallel=run.parallel,
        optimizer=run.optimizer,
        precision=run.train.precision,
        z_loss=run.train.z_loss,
        micro_batch_size=run.train.micro_batch_size,
        num_microbatches=run.train.batch_size // (run.train.micro_batch_size * grid.dp_size),
        partition=partition,
    )
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint, verified=True)
    tokenizer = Tokenizer(tokenizer_path) if tokenizer_path is not None else None
    topology = {"world_size": grid.world_size} | {name: axis.size for name, axis in grid.axes.items()}
    environment = describe_environment(topology) if grid.is_lead else {}
    log = agreed(grid, lambda: open_run(run, grid, blueprint, first_step, environment, tokenizer_path))
    log.event(first_step, "resumed" if checkpoint else "started", f"from {checkpoint}" if checkpoint else "")

    def save(step: int) -> None:
        start = time.perf_counter()
        path = save_checkpoint(
            engine,
            run.directory / "checkpoints",
            step=step,
            progress=progress,
            config_yaml=dump_config(run),
            environment=environment,
            tokenizer_path=tokenizer_path,
            keep_last=run.checkpoint.keep_last,
            keep_every=run.checkpoint.keep_every,
        )
        log.event(step, "saved", f"{path} in {time.perf_counter() - start:.1f} s")

    peak = peak_flops(grid.device)
    tokens_per_step = run.train.batch_size * run.data.sequence_length
    flops_per_step = 3 * blueprint.flops_per_token(run.data.sequence_length) * tokens_per_step
    batches = loader.batches(progress["consumed_samples"])
    for step in range(first_step + 1, run.train.steps + 1):  # the step that this iteration completes
        start = time.perf_counter()
        lr = learning_rate(
            step - 1, peak=run.optimizer.lr, total_steps=run.train.steps, schedule=run.optimizer.schedule
        )
        result = engine.step(next(batches), lr, stop=stop_signal.name is not None)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise RunError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; nothing was saved after the last "
                "checkpoint; start again with a lower optimizer.lr or a longer warm-up to continue from it"
            )
        progress = {"step": step, "consumed_samples": progress["consumed_samples"] + run.train.batch_size}
        seconds = time.perf_counter() - start
        last = step == run.train.steps
        log.progress(result.loss, tokens_per_step / seconds)
        if step % run.log.every == 0 or last:
            utilisation = flops_per_step / seconds / (peak * grid.world_size) if peak else None
            values = step_metrics(run, progress, result, lr, tokens_per_step / seconds, seconds, utilisation, grid)
            log.metrics(values | module_metrics(model))
        if result.stop or last or step % run.checkpoint.every == 0:
            save(step)
        if run.eval.every is not None and (step % run.eval.every == 0 or last) and not result.stop:
            look(run, grid, engine, model, tokenizer, log, step, whole=last)
        if result.stop and not last:
            log.event(step, "interrupted", f"by {stop_signal.name or 'a signal'}; the same command continues from here")
            break
    else:
        log.event(run.train.steps, "finished", f"python -m eval.report {run.directory} shows the run")
    batches.close()
    log.close()
    grid.close()


def check_run(run: RunConfig, grid: Grid) -> Path | None:
    """Refuses what cannot be trained, before anything is built; returns the tokenizer.

    The lead alone reads every index from end to end: at a billion documents that is much to ask of a file system.
    """
    check_batch(run.train.batch_size, run.train.micro_batch_size, grid.dp_size)
    validates = run.eval.every is not None
    tokenizer_path = check_data(run.data, run.model.vocab_size, validation=validates, sweep=grid.is_lead)
    if run.eval.prompts and tokenizer_path is None:
        raise ConfigError(
            "eval.prompts: given, but the data have no tokenizer; set data.tokenizer or clear the prompts"
        )
    if run.eval.prompts and run.parallel.sequence * run.parallel.tensor > 1:
        raise ConfigError(
            "eval.prompts: given, but no rank holds the whole model or row under parallel.sequence or parallel.tensor; "
            "clear the prompts, and generate from a checkpoint (python -m eval.generate)"
        )
    if run.checkpoint.resume == "none" and (run.directory / "config.yaml").exists():
        raise ConfigError(
            f"checkpoint.resume: none, but {run.directory} holds a run; choose another name, remove the directory, or "
            "continue with checkpoint.resume=auto"
        )
    refuse_other_run(run, tokenizer_path)
    return tokenizer_path


def make_directory(run: RunConfig) -> None:
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"log.directory: {run.log.directory!r}; {run.directory} cannot be made there ({error.strerror}); name a "
            "directory that can be written to"
        ) from error


def choose_start(run: RunConfig, grid: Grid, tokenizer_path: Path | None) -> tuple[Path | None, dict[str, int]]:
    """The checkpoint that the run continues from, verified, and its progress; None and step 0 for a fresh start.

    Collective. A checkpoint of the run itself comes before the one that `checkpoint.resume` names, so that a run that
    began from another's goes on from its own.

    Raises:
        ValueError: all checkpoints are broken, or the one named is of another model, or the run is at its end.
    """
    checkpoints = run.directory / "checkpoints"
    path, skipped = find_checkpoint(grid, checkpoints)
    if grid.is_lead:
        for reason in skipped:
            print(f"train.py: skipped {reason}", file=sys.stderr)
    if path is None and skipped:
        raise RunError(
            f"{checkpoints}: no checkpoint is whole; restore one, or remove the directory to start from step 0"
        )
    if path is None and run.checkpoint.resume not in ("auto", "none"):
        path = Path(run.checkpoint.resume)
        agreed(grid, lambda: verify(path, part=grid.rank, parts=grid.world_size))
    if path is None:
        return None, {"step": 0, "consumed_samples": 0}
    meta = agreed(grid, lambda: read_meta(path))
    agreed(grid, lambda: refuse_other_model(run, path, meta["model"], tokenizer_path))
    if meta["step"] > run.train.steps:
        raise RunError(
            f"train.steps: {run.train.steps}, but {path} is at step {meta['step']}; train longer or remove it"
        )
    return path, {"step": meta["step"], "consumed_samples": meta["progress"]["consumed_samples"]}


def open_run(
    run: RunConfig,
    grid: Grid,
    model: LM,
    first_step: int,
    environment: dict,
    tokenizer_path: Path | None,
) -> RunLog:
    """Writes what explains the run into its directory, shows the layer table, and opens the log."""
    if grid.is_lead:
        write_whole(run.directory / "config.yaml", dump_config(run))
        earlier = run.directory / "environment.json"
        if earlier.exists():  # a resumed run may go on elsewhere
            earlier.replace(run.directory / f"environment_until_{first_step:08d}.json")
        write_whole(earlier, json.dumps(environment, indent=2))
        table = model.layer_table(run.data.sequence_length)
        write_whole(run.directory / "layers.json", json.dumps(table, indent=2))
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, run.directory / "tokenizer.model")
    log = RunLog(
        run.directory,
        active=grid.is_lead,
        total_steps=run.train.steps,
        first_step=first_step,
        wandb=run.log.wandb,
        config=config_as_dict(run),
    )
    if grid.is_lead:
        log.say(format_table(table))
        log.say(
            f"{model.num_params():,} parameters, {model.flops_per_token(run.data.sequence_length):,} forward FLOPs "
            f"a token, {grid.world_size} ranks on {environment['device']}, {run.train.precision}, "
            f"ZeRO {run.parallel.zero_stage}"
        )
    return log


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: whoever is killed meanwhile leaves the earlier one."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def look(
    run: RunConfig,
    grid: Grid,
    engine: Engine,
    model: LM,
    tokenizer: Tokenizer | None,
    log: RunLog,
    step: int,
    *,
    whole: bool,
) -> None:
    """Validates, on all held-out rows where `whole`, and lets the lead continue the prompts."""
    result = validate(
        engine.evaluate,
        validation_batches(
            run.data,
            micro_batch_size=run.train.micro_batch_size,
            dp_rank=grid.dp_rank,
            dp_size=grid.dp_size,
            max_sequences=None if whole else run.eval.sequences,
            vocab_size=run.model.vocab_size,
        ),
        sequence_length=run.data.sequence_length,
        tokenizer=tokenizer,
        all_reduce=grid.sum,
    )
    log.metrics({"step": step} | result.as_metrics())
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    log.say(f"step {step}: validation loss {result.loss:.4f}{bits} over {result.tokens:,} tokens")
    if grid.is_lead and run.eval.prompts and tokenizer is not None:
        texts = sample_text(
            model,
            tokenizer,
            run.eval.prompts,
            max_tokens=run.eval.sample_tokens,
            temperature=run.eval.temperature,
            top_p=run.eval.top_p,
            seed=step,
        )
        path = run.directory / "samples" / f"step_{step:08d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def step_metrics(
    run: RunConfig,
    progress: dict[str, int],
    result: StepResult,
    lr: float,
    tokens_per_second: float,
    seconds: float,
    utilisation: float | None,
    grid: Grid,
) -> dict:
    """One training line of `metrics.jsonl`."""
    return {
        "step": progress["step"],
        "consumed_samples": progress["consumed_samples"],
        "tokens": progress["consumed_samples"] * run.data.sequence_length,
        "loss": result.loss,
        "z_loss": result.z_loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens_per_second": tokens_per_second,
        "step_time": seconds,
        "memory_gb": peak_memory_gb(grid.device),
        "mfu": utilisation,
    }


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held: of the GPU, or of the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


if __name__ == "__main__":
    sys.exit(main())
