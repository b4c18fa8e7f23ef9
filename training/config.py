"""How a run trains, logs, validates and saves, as frozen data."""

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16"]


def _at_least(config: object, minimum: int, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < minimum:
            raise ValueError(f"{key}: {value}; must be at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """
    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: sequences of one optimizer step over all ranks.
        micro_batch_size: sequences of one forward pass of one rank; the number of accumulated microbatches follows.
        precision: `fp32`, or `bf16`: fp32 parameters and reductions, bf16 matrix products.
        z_loss: weight of the mean squared log normaliser (Chowdhery et al., 2022, section 5); logged apart.
        seed: of the initial weights.
        time_limit_minutes: the run saves and leaves in time to be gone by then, counted from the start of its
            processes, and the same command goes on; null: it stays until it is done.
        save_margin_minutes: of these, what is kept for the last step and the save; more where saves prove longer.
        check_values: ops refuse log decays above 0, too long keys and positions that skip, on the device;
            for looking into a run that diverges, as every check makes the host wait.
    """

    steps: int
    batch_size: int
    micro_batch_size: int
    precision: Precision = "bf16"
    z_loss: float = 1e-4
    seed: int = 0
    time_limit_minutes: float | None = None
    save_margin_minutes: float = 2.0
    check_values: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "micro_batch_size")
        _at_least(self, 0, "save_margin_minutes")
        if self.time_limit_minutes is not None and self.time_limit_minutes <= self.save_margin_minutes:
            raise ValueError(
                f"time_limit_minutes: {self.time_limit_minutes}; must exceed save_margin_minutes "
                f"({self.save_margin_minutes}), which it contains; raise the one or lower the other"
            )
        if self.z_loss < 0:
            raise ValueError(f"z_loss: {self.z_loss}; must not be negative, 0 switches it off")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of the step.

    Attributes:
        kind: `cosine` falls from the peak to `final_fraction` of it over the rest of the run; `wsd` stays at the peak
            and falls over the last `decay_steps`, along 1 - sqrt(progress) (Hägele et al., 2024).
        warmup_steps: linear rise from 0; the first step already moves.
        decay_steps: of `wsd` alone.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        _at_least(self, 0, "warmup_steps")
        _at_least(self, 1, "decay_steps")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction: {self.final_fraction}; must lie in 0 to 1")
        if (self.kind == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                f"decay_steps: {self.decay_steps}; kind wsd needs it and cosine has none, kind is {self.kind}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019). `weight_decay` spares the parameters that `training/optimizer.py` lists."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "clip_norm"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"{key}: {value}; must be positive")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)}; each must lie in 0 to 1, 1 excluded")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: {self.weight_decay}; must not be negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """
    Attributes:
        every: steps between checkpoints; one is written besides at the end, on SIGINT, SIGTERM or SIGUSR1, and at
            `train.time_limit_minutes`.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints at multiples of this step, itself a multiple of `every`, are kept for good.
        keep_best: so is the one with the lowest validation loss over `eval.sequences` rows, under the link `best`.
        asynchronous: training waits for the copy to host memory alone, while the checkpoint before is complete.
        resume: `auto` continues from the newest good checkpoint of the run directory, `none` refuses a directory that
            holds a run, anything else is a checkpoint from which a run without one of its own starts.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    keep_best: bool = True
    asynchronous: bool = True
    resume: str = "auto"

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "keep_last", "keep_every")
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every: {self.keep_every}; must be a multiple of every, {self.every}: no other step is saved; "
                f"take {-(-self.keep_every // self.every) * self.every}"
            )


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; `offline` writes below the run directory."""

    project: str
    mode: Literal["online", "offline", "disabled"] = "online"
    entity: str | None = None


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """`directory` holds one directory a run; `every` is in steps. With `traffic`, the first step of a start tells what
    the first rank sent beside the reduction of gradients, by axis and operation."""

    directory: str = "runs"
    every: int = 10
    wandb: WandbConfig | None = None
    traffic: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "every")
        if not self.directory:
            raise ValueError("directory: ''; must name a directory, `.` for this one")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """
    Attributes:
        every: steps between validations and samples; both happen at the end besides. None: neither, ever.
        sequences: held-out rows a validation in the loop reads; None reads all.
        prompts: texts that are continued in the loop.
        sample_tokens, temperature, top_p: of these continuations.
        tasks: evaluation tasks asked in the loop, of this tree and of lm-evaluation-harness (`python -m eval --list`).
        tasks_every: steps between two times; they are asked at the end besides.
        task_options: settings of tasks of this tree, by task.
        tasks_include: a directory of further lm-evaluation-harness tasks.
        tasks_length: the most tokens of a row that a task asks about, `data.sequence_length` by default; shorter rows
            share one.
    """

    every: int | None = None
    sequences: int | None = None
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    tasks: tuple[str, ...] = ()
    tasks_every: int | None = None
    task_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks_include: str | None = None
    tasks_length: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "sequences", "sample_tokens", "tasks_every", "tasks_length")
        if bool(self.tasks) != (self.tasks_every is not None):
            raise ValueError(
                f"tasks_every: {self.tasks_every} with tasks {list(self.tasks)}; give both, or neither: set "
                "tasks_every, for example to the steps between two checkpoints"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature}; must not be negative, 0 is greedy")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p}; must lie in 0 to 1, 0 excluded")
