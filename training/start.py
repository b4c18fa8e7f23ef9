"""A run before its first step: checked, built, and loaded with what it continues from."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from configs.same_run import refuse_other_model, refuse_other_run
from configs.schema import ConfigError, RunConfig, config_as_dict, dump_config
from data.corpus import check_data
from data.loader import Loader, check_batch
from data.skipped import check_ranges
from eval.in_loop import tasks_of
from eval.tasks.task import Task
from models.checkpoint import list_checkpoints, verify
from models.lm import LM
from parallel.checkpoint import find_checkpoint, load_checkpoint, read_training_meta
from parallel.engine import Engine
from parallel.grid import Grid, everywhere
from parallel.partition import build_model
from parallel.pipeline import make_engine
from parallel.stages import describe
from parallel.writer import CheckpointWriter
from training.environment import describe_environment
from training.log import RunLog, format_table
from training.progress import Progress, refuse_other_data
from training.run_directory import RunDirectory, write_whole

T = TypeVar("T")


class RunError(ValueError):
    """The run cannot start or go on, for a reason that every rank knows."""


class Job(NamedTuple):
    """What a run is made of. `origin` is the checkpoint that it began or went on from, None at step 0."""

    run: RunConfig
    grid: Grid
    directory: RunDirectory
    model: LM
    engine: Engine
    loader: Loader
    tokenizer_path: Path | None
    environment: dict[str, Any]
    flops_per_step: int
    origin: Path | None
    log: RunLog
    tasks: dict[str, Task]
    writer: CheckpointWriter


def agreed(grid: Grid, action: Callable[[], T]) -> T:
    """What `action`, which must not communicate, returns; RunError on every rank if it fails on any. Collective."""
    try:
        return everywhere(grid, action, ValueError)
    except ValueError as error:
        raise RunError(error) from error


def assemble(run: RunConfig, grid: Grid, directory: RunDirectory) -> tuple[Job, Progress]:
    """Checks everything, then builds it and loads what the run continues from. Collective."""
    tokenizer_path = agreed(grid, lambda: check_run(run, grid))
    tasks = agreed(grid, lambda: tasks_of(run, tokenizer_path))
    model, blueprint, partition = agreed(
        grid,
        lambda: build_model(
            run.model, grid, seed=run.train.seed, sequence_length=run.data.sequence_length, parallel=run.parallel
        ),
    )
    origin, progress = choose_start(run, grid, tokenizer_path)
    share = {"micro_batch_size": run.train.micro_batch_size, "dp_rank": grid.dp_rank, "dp_size": grid.dp_size}
    loader = Loader(run.data, split="train", batch_size=run.train.batch_size, vocab_size=run.model.vocab_size, **share)
    progress = agreed(grid, lambda: placed(run, loader, origin, progress))
    engine = make_engine(
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
    if origin is not None:
        load_checkpoint(engine, origin, verified=True)
    directory.step = progress.step
    topology = {"world_size": grid.world_size} | {name: axis.size for name, axis in grid.axes.items()}
    environment = describe_environment(topology) if grid.is_lead else {}
    log = agreed(grid, lambda: open_run(run, grid, blueprint, progress.step, environment, tokenizer_path))
    if partition.stages is not None and partition.stages.size > 1:
        log.say(describe(partition.stages, engine.num_microbatches))
    log.event(progress.step, "resumed" if origin else "started", f"from {origin}" if origin else "")
    tokens_per_step = run.train.batch_size * run.data.sequence_length
    flops_per_step = 3 * blueprint.flops_per_token(run.data.sequence_length) * tokens_per_step
    keep = run.checkpoint
    writer = CheckpointWriter(
        grid,
        run.directory / "checkpoints",
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        keep_best=keep.keep_best,
        asynchronous=keep.asynchronous,
    )
    return Job(
        run,
        grid,
        directory,
        model,
        engine,
        loader,
        tokenizer_path,
        environment,
        flops_per_step,
        origin,
        log,
        tasks,
        writer,
    ), progress


def check_start(run: RunConfig, grid: Grid) -> None:
    """Refuses what `assemble` would, before anything is built and without other ranks; but sums of checkpoints are not
    verified."""
    tokenizer_path = check_run(run, grid)
    tasks_of(run, tokenizer_path)
    if run.checkpoint.resume not in ("auto", "none") and not list_checkpoints(run.directory / "checkpoints"):
        path = Path(run.checkpoint.resume)
        refuse_other_model(run, path, read_training_meta(path)["model"], tokenizer_path)


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
    if run.eval.prompts and run.parallel.pipeline > 1:
        raise ConfigError(
            f"eval.prompts: given, and parallel.pipeline is {run.parallel.pipeline}, whose stages cannot generate; "
            "clear the prompts, and generate from a checkpoint (python -m eval.generate)"
        )
    if run.checkpoint.resume == "none" and (run.directory / "config.yaml").exists():
        raise ConfigError(
            f"checkpoint.resume: none, but {run.directory} holds a run; choose another name, remove the directory, or "
            "continue with checkpoint.resume=auto"
        )
    refuse_other_run(run, tokenizer_path)
    return tokenizer_path


def choose_start(run: RunConfig, grid: Grid, tokenizer_path: Path | None) -> tuple[Path | None, Progress]:
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
        return None, Progress()
    meta = agreed(grid, lambda: read_training_meta(path))
    agreed(grid, lambda: refuse_other_model(run, path, meta["model"], tokenizer_path))
    if meta["step"] > run.train.steps:
        raise RunError(
            f"train.steps: {run.train.steps}, but {path} is at step {meta['step']}; train longer or remove it"
        )
    return path, agreed(grid, lambda: read_progress(path, meta))


def placed(run: RunConfig, loader: Loader, origin: Path | None, progress: Progress) -> Progress:
    """`progress` in the data of this run; ValueError if it counts samples of others."""
    if origin is not None:
        refuse_other_data(progress, loader.num_rows, origin, own=origin.parent == run.directory / "checkpoints")
    return replace(progress, rows=loader.num_rows)


def read_progress(path: Path, meta: dict[str, Any]) -> Progress:
    """What a checkpoint says of how far its run had come; ValueError if it does not say it."""
    kept = meta["progress"]
    try:
        consumed, skipped = int(kept["consumed_samples"]), check_ranges(kept.get("skipped", ()))
        step, rows, health = meta["step"], tuple(kept.get("rows", ())), kept.get("health", {})
        return Progress(step=step, consumed_samples=consumed, skipped=skipped, rows=rows, health=health)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: its progress cannot be read ({error}); use another checkpoint") from error


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
