"""Trains a language model as one YAML describes it.

torchrun --nproc-per-node 2 train.py configs/demo.yaml train.steps=100
python train.py configs/demo.yaml                    one process

Exit codes: 0 finished, 75 interrupted (the same command goes on), 1 failed or refused, as for a YAML that does not
hold, 2 for a command line that cannot be parsed. exit.json in the run directory says the same, as torchrun knows 0 and
1 only; what is refused before there is one leaves the reason beside (`training/ending.py`): of RUN_DIRECTORY in the
environment where the YAML cannot be read.
"""

import argparse
import os
import socket
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

from configs.schema import RunConfig, dump_config, load_config
from data.loader import validation_batches
from data.skipped import kept_sample, skip
from data.tokenizer import Tokenizer
from eval.generate import sample_text
from eval.in_loop import LoopModel, holds_whole_model, in_words, longest_row, task_metrics
from eval.validate import Validation, validate
from models.checkpoint import CheckpointError, read_meta
from ops import checked_values
from parallel.checkpoint import find_checkpoint, load_checkpoint
from parallel.engine import StepResult
from parallel.generation import generating
from parallel.grid import init_distributed
from parallel.plan.fits import refuse_too_large
from parallel.saved import Saved
from parallel.traffic import by_layer, counted, summary
from parallel.watch import Watch, explained
from training.ending import FAILED, exit_code
from training.environment import peak_flops, peak_memory_gb
from training.health import Health
from training.log import RunLog
from training.metrics import largest, module_metrics
from training.own_time import OwnTime, Stragglers
from training.progress import Progress
from training.run_directory import RunDirectory, tell_of_refusal
from training.schedule import learning_rate
from training.start import Job, RunError, agreed, assemble, read_progress
from training.stopping import StopRequest
from training.watchdog import Watchdog, dump_stacks, stacks_file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces one value of the YAML")
    args = parser.parse_args(argv)
    directory = os.environ.get("RUN_DIRECTORY")
    try:
        run = load_config(args.config, args.overrides)
        directory = str(run.directory)
        refuse_too_large(run)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a machine read the same file and fail alike
            print(f"train.py: {error}", file=sys.stderr)
            tell_of_refusal(directory, str(error))
        return FAILED
    try:
        with checked_values() if run.train.check_values else nullcontext():
            return train(run)
    except (RunError, CheckpointError) as error:  # raised alike on every rank
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"train.py: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
    except RuntimeError as error:
        if (reason := explained(error)) is None:
            raise
        print(f"train.py: rank {os.environ.get('RANK', '0')}: {reason}", file=sys.stderr)
    return FAILED


def train(run: RunConfig) -> int:
    """Trains to the last step or until it is asked to leave; returns the exit code."""
    stop = StopRequest(run.train.time_limit_minutes, run.train.save_margin_minutes)
    ranks = init_distributed(run.parallel.timeout_minutes)
    watch = Watch(ranks, run.parallel.timeout_minutes)
    split = run.parallel
    sizes = {"pipeline": split.pipeline, "sequence": split.sequence, "tensor": split.tensor}
    with RunDirectory(run.directory, lead=ranks.is_lead) as directory:
        with directory.refusals_marked():
            grid = agreed(ranks, lambda: ranks.arranged(**sizes))
            agreed(grid, directory.claim)
        watch.last_words = lambda reason: tell_of_death(directory, grid.rank, reason)
        with directory.failures_marked(explain=explained):
            job, progress = assemble(run, grid, directory)
        watch.last_words = lambda reason: tell_of_death(directory, grid.rank, reason, job.log)
        with closing(job.log), directory.failures_marked(explain=explained, tell=job.log.event):
            code = take_steps(job, progress, stop)
    stop.close()
    watch.close()
    grid.close()
    return code


def take_steps(job: Job, progress: Progress, stop: StopRequest) -> int:
    """The training loop; returns the exit code."""
    run, grid, engine, log = job.run, job.grid, job.engine, job.log
    health, own_time = Health(run.health, progress.health), OwnTime(engine.called, grid.device)
    stragglers = Stragglers(grid.gather(socket.gethostname()), run.health.slow_factor)
    watchdog = Watchdog(job.directory.path, grid.rank, run.health, last_words=lambda what: tell_of_hang(job, what))
    batches = job.loader.batches(progress.consumed_samples, progress.skipped)
    stopping, first_step = False, progress.step
    while progress.step < run.train.steps and not stopping:
        start = time.perf_counter()
        lr = learning_rate(
            progress.step, peak=run.optimizer.lr, total_steps=run.train.steps, schedule=run.optimizer.schedule
        )
        counting = counted(job.model) if run.log.traffic and progress.step == first_step else nullcontext()
        with watchdog.step(), counting as traffic:
            microbatches = next(batches)
            own_time.add(time.perf_counter() - start)
            result = engine.step(microbatches, lr, stop=stop.requested, accept=health.accepts)
        seconds, stopping = time.perf_counter() - start, result.stop
        if traffic is not None:
            log.event(progress.step + 1, "traffic", summary(traffic.volumes), layers=by_layer(traffic.volumes))
        step, problem = progress.step + 1, health.problem(result.loss, result.grad_norm)
        if result.accepted:
            health.made(result.loss, result.grad_norm)
            consumed = progress.consumed_samples + run.train.batch_size
            progress = replace(progress, step=step, consumed_samples=consumed)
            job.directory.step = step
            log.progress(step, result.loss, run.train.batch_size * run.data.sequence_length / seconds)
            if problem is not None:
                log.event(step, "spike", problem)
        else:
            progress, goes_back = leave_out(job, health, progress, result, problem or "refused by another rank")
            if goes_back:
                progress = go_back(job, health, progress)
                batches.close()
                batches = job.loader.batches(progress.consumed_samples, progress.skipped)

        last = progress.step == run.train.steps
        if result.accepted and (step % run.log.every == 0 or last):
            told = grid.gather((own_time.take(), grid.axes["pipeline"].index))
            of_modules = largest(grid.gather(module_metrics(job.model)))
            log_step(job, progress, result, lr, seconds, stragglers.compare(*zip(*told)), of_modules)
        validation = look_if_due(job, step, last) if result.accepted and not stopping else None
        if stopping or (result.accepted and (step % run.checkpoint.every == 0 or last)):
            save(job, replace(progress, health=health.state()), validation)
        report_saved(job, stop, job.writer.poll())
        if last and validation is not None and run.eval.sequences is not None:
            measure(job, step, None)
    watchdog.close()
    report_saved(job, stop, job.writer.wait())
    batches.close()
    return leave(job, progress, stop)


def tell_of_death(directory: RunDirectory, rank: int, reason: str, log: RunLog | None = None) -> None:
    """What is left to say when another rank is found to be gone."""
    directory.end("failed", reason, resumable=True)
    if directory.holds_run:
        dump_stacks(stacks_file(directory.path, rank))
    if log is not None:
        log.event(directory.step, "failed", reason)


def tell_of_hang(job: Job, what: str) -> None:
    """What is left to say from the watchdog's thread while the loop hangs."""
    job.directory.end("failed", what, resumable=True)
    job.log.event(job.directory.step + 1, "hang", what)


def save(job: Job, progress: Progress, validation: Validation | None) -> None:
    """Begins a checkpoint, which the loop need not wait for. Collective."""
    job.writer.save(
        job.engine,
        step=progress.step,
        progress=progress.as_json(),
        config_yaml=dump_config(job.run),
        environment=job.environment,
        tokenizer_path=job.tokenizer_path,
        validation=None if validation is None else {"loss": validation.loss, "tokens": validation.tokens},
    )


def report_saved(job: Job, stop: StopRequest, complete: list[Saved]) -> None:
    """Tells of the checkpoints that have become complete."""
    for saved in complete:
        stop.saved(saved.seconds)
        job.log.event(saved.step, "saved", str(saved), **saved.figures)


def leave_out(job: Job, health: Health, progress: Progress, result: StepResult, problem: str) -> tuple[Progress, bool]:
    """Puts the samples of a step that was not made behind the run; returns also whether the run is to go back."""
    first, last = job.loader.samples(progress.consumed_samples, progress.skipped)
    job.log.event(progress.step + 1, "skipped", f"{problem}; samples {first} to {last}")
    goes_back = health.not_made(result.loss, result.grad_norm, (first, last))
    return replace(progress, skipped=skip(progress.skipped, first, last)), goes_back


def go_back(job: Job, health: Health, progress: Progress) -> Progress:
    """Goes on from the newest good checkpoint, without what was left out since. Collective.

    Raises:
        RunError: there is none, or the run has gone back too often.
    """
    run, step = job.run, progress.step + 1
    left_out = ", ".join(f"{first} to {last}" for first, last in health.left_out)
    way_out = "look at the events and samples, and start again with a lower optimizer.lr or a longer warm-up"
    if not health.may_go_back:
        raise RunError(
            f"health.max_rollbacks: {run.health.max_rollbacks}, all used, and step {step} had to be left out again "
            f"(samples {left_out}); {way_out}"
        )
    for saved in job.writer.wait():
        job.log.event(saved.step, "saved", str(saved), **saved.figures)
    path, _ = find_checkpoint(job.grid, run.directory / "checkpoints")
    path = path or job.origin
    if path is None:
        raise RunError(
            f"step {step}: left out (samples {left_out}), and there is no checkpoint to go back to; {way_out}"
        )
    meta = agreed(job.grid, lambda: read_meta(path))
    stored = agreed(job.grid, lambda: read_progress(path, meta))
    load_checkpoint(job.engine, path)
    skipped, margin = progress.skipped, run.health.skip_around * run.train.batch_size
    reached = kept_sample(stored.consumed_samples, stored.skipped)  # what comes before has been consumed
    for first, last in health.left_out:
        skipped = skip(skipped, max(reached, first - margin), last + margin)
    health.went_back(stored.health)
    job.directory.step = stored.step
    job.log.event(stored.step, "rolled back", f"from step {step} to {path}; samples left out: {left_out}")
    return replace(stored, skipped=skipped, rows=progress.rows)


def leave(job: Job, progress: Progress, stop: StopRequest) -> int:
    """Says how the run ended; returns the exit code."""
    if progress.step == job.run.train.steps:
        job.log.event(progress.step, "finished", f"python -m eval.report {job.run.directory} shows the run")
        job.directory.end("finished", "", resumable=False)
        return exit_code("finished")
    job.log.event(progress.step, "interrupted", f"by {stop.reason}; the same command continues from here")
    job.directory.end("interrupted", stop.reason, resumable=True)
    return exit_code("interrupted")


def measure(job: Job, step: int, sequences: int | None) -> Validation:
    """Validates on so many held-out rows, None: on all."""
    run, grid, log = job.run, job.grid, job.log
    tokenizer = Tokenizer(job.tokenizer_path) if job.tokenizer_path is not None else None
    result = validate(
        job.engine.evaluate,
        validation_batches(
            run.data,
            micro_batch_size=run.train.micro_batch_size,
            dp_rank=grid.dp_rank,
            dp_size=grid.dp_size,
            max_sequences=sequences,
            vocab_size=run.model.vocab_size,
        ),
        sequence_length=run.data.sequence_length,
        tokenizer=tokenizer,
        all_reduce=grid.sum,
    )
    log.metrics({"step": step} | result.as_metrics())
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    log.say(f"step {step}: validation loss {result.loss:.4f}{bits} over {result.tokens:,} tokens")
    return result


def look_if_due(job: Job, step: int, last: bool) -> Validation | None:
    """What the run has to show of itself after a step; its validation, if there is one. Collective."""
    settings, validation = job.run.eval, None
    if settings.every is not None and (step % settings.every == 0 or last):
        validation = look(job, step)
    if job.tasks and (step % (settings.tasks_every or 1) == 0 or last):
        ask_tasks(job, step)
    return validation


def look(job: Job, step: int) -> Validation:
    """Validates on `eval.sequences` rows, as checkpoints are compared by, and continues the prompts."""
    run = job.run
    result = measure(job, step, run.eval.sequences)
    if run.eval.prompts and job.tokenizer_path is not None:
        with generating(job.model, job.grid) as model:
            texts = sample_text(
                model,
                Tokenizer(job.tokenizer_path),
                run.eval.prompts,
                max_tokens=run.eval.sample_tokens,
                temperature=run.eval.temperature,
                top_p=run.eval.top_p,
                seed=step,
            )
        if job.grid.is_lead:
            path = run.directory / "samples" / f"step_{step:08d}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return result


def ask_tasks(job: Job, step: int) -> None:
    """The evaluation tasks of the run, on all ranks together."""
    run, grid = job.run, job.grid
    tokenizer = Tokenizer(job.tokenizer_path) if job.tokenizer_path is not None else None
    model = LoopModel(
        job.engine.judge,
        add_up=grid.sum,
        collect=grid.gather,
        data_rank=grid.dp_rank,
        data_ranks=grid.dp_size,
        rows=run.train.micro_batch_size,
        longest=longest_row(run),
        vocab_size=run.model.vocab_size,
        tokenizer=tokenizer,
        whole=job.model if holds_whole_model(run) else None,
    )
    found = task_metrics(job.tasks, model)
    job.log.metrics({"step": step} | found)
    job.log.say(f"step {step}: {in_words(found)}")


def log_step(
    job: Job,
    progress: Progress,
    result: StepResult,
    lr: float,
    seconds: float,
    straggler: tuple[dict[str, Any], str | None],
    of_modules: dict[str, float],
) -> None:
    """One training line of `metrics.jsonl`, and a word on a rank that has become slow."""
    run, peak = job.run, peak_flops(job.grid.device)
    values = {
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "tokens": progress.consumed_samples * run.data.sequence_length,
        "loss": result.loss,
        "z_loss": result.z_loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens_per_second": run.train.batch_size * run.data.sequence_length / seconds,
        "step_time": seconds,
        "memory_gb": peak_memory_gb(job.grid.device),
        "mfu": job.flops_per_step / seconds / (peak * job.grid.world_size) if peak else None,
    }
    figures, slow = straggler
    job.log.metrics(values | figures | of_modules)
    if slow is not None:
        job.log.event(progress.step, "slow rank", slow)


if __name__ == "__main__":
    sys.exit(main())
