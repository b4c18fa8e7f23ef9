"""How a run is spread over ranks, as frozen data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from models.mixers import MIXERS
from training.config import Precision

DEEPSPEED_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""The keys at the top of a DeepSpeed configuration. DeepSpeed passes over any other without a word."""

DERIVED_KEYS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size, train.micro_batch_size and the number of ranks",
    "managed_gradient_accumulation": "train.batch_size, train.micro_batch_size and the number of ranks",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.precision",
    "torch_autocast": "train.precision",
    "communication_data_type": "train.precision, which reduces gradients in fp32",
    "gradient_allreduce_op": "the exact token mean of the loss",
    "gradient_predivide_factor": "the exact token mean of the loss",
    "prescale_gradients": "the exact token mean of the loss",
    "steps_per_print": "log.every",
    "pipeline": "parallel.pipeline, parallel.stages and parallel.activation_checkpointing",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.compute_grad_norm": "the log, which reports the gradient norm of every step",
}
"""DeepSpeed keys that Rondo sets, each with what decides it."""

OFFLOADS = {"zero_optimization.offload_optimizer": 1, "zero_optimization.offload_param": 3}
"""DeepSpeed keys that keep state in the machine's memory, each with the lowest ZeRO stage that can."""

REDUCE_BUCKET_SIZE = 50_000_000
"""Entries of gradients that are reduced at once: 200 MB; DeepSpeed's own default takes 2 GB of a GPU."""

DEFAULTS = {
    "zero_optimization": {"reduce_bucket_size": REDUCE_BUCKET_SIZE},
    "timers": {"throughput": {"enabled": False}},  # it waits for the device around every forward pass
}
"""DeepSpeed keys whose defaults do not serve; `engine` may change them."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """
    Attributes:
        pipeline: ranks one after the other, each with some of the layers.
        stages: blocks of each of them, in order; by default as even as their FLOPs allow, the head's counted.
        sequence: ranks that share each row, a slice of its tokens each.
        tensor: ranks that share each layer, some of its heads, channels and hidden units each. What is left of the
            ranks works on different rows.
        sequence_sharded_norms: norms and residuals between what is cut over tensor ranks are computed by each rank for
            its share of the tokens (Megatron-LM's sequence parallelism), instead of for all by every rank.
        zero_stage: what the data-parallel ranks split among them: 0 nothing, 1 optimizer moments and master weights,
            2 gradients besides, 3 weights too, which come together layer by layer as they are used.
        activation_checkpointing: the blocks that keep only their input for the backward pass, and run once more in it:
            `none`, `full` for all, or `selective`.
        checkpointed_mixers, checkpointed_every: which those of `selective` are, the blocks of these mixers or, from the
            first on, every so many-th.
        compile: torch.compile on what lies between the ops of each block (`parallel/compiled.py`).
        timeout_minutes: how long a rank waits for the others before it gives up.
        engine: further DeepSpeed configuration, passed through as it is, for example
            `{zero_optimization: {overlap_comm: true}}`.
    """

    pipeline: int = 1
    stages: tuple[int, ...] | None = None
    sequence: int = 1
    tensor: int = 1
    sequence_sharded_norms: bool = False
    zero_stage: int = 1
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    checkpointed_mixers: tuple[str, ...] = ()
    checkpointed_every: int | None = None
    compile: bool = False
    timeout_minutes: float = 30.0
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("pipeline", "sequence", "tensor"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; must be at least 1")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage: {self.zero_stage}; must be 0, 1, 2 or 3")
        if self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes: {self.timeout_minutes}; must be positive")
        if self.sequence_sharded_norms and self.tensor == 1:
            raise ValueError(
                "sequence_sharded_norms: true; needs tensor ranks, and tensor is 1; set tensor, or leave it out"
            )
        if self.compile and (self.tensor > 1 or self.zero_stage == 3):
            raise ValueError(
                "compile: true; needs tensor: 1 and a zero_stage below 3, as graphs hold nothing of what tensor ranks "
                f"send and ZeRO 3 gathers; they are {self.tensor} and {self.zero_stage}; change them, or leave it out"
            )
        self._check_pipeline()
        self._check_checkpointing()
        for key, value in self.engine.items():
            if key not in DEEPSPEED_KEYS:
                (nearest,) = get_close_matches(key.lower(), sorted(DEEPSPEED_KEYS), n=1, cutoff=0.0)
                raise ValueError(
                    f"engine.{key}: {value!r}; not a key that DeepSpeed reads at the top; the nearest is {nearest}; "
                    "correct or remove it (ZeRO's own settings stand under engine.zero_optimization)"
                )
        for path, value in _paths(self.engine):
            if path == "zero_optimization" and not isinstance(value, Mapping):
                raise ValueError(f"engine.{path}: {value!r}; must be a mapping; set zero_stage for the stage")
            if path in DERIVED_KEYS:
                raise ValueError(f"engine.{path}: {value!r}; follows from {DERIVED_KEYS[path]}; remove it and set that")
            if path in OFFLOADS:
                self._check_offload(path, value)
            if path == "zero_optimization.overlap_comm" and value and self.pipeline > 1:
                raise ValueError(
                    f"engine.{path}: {value!r}; DeepSpeed does not overlap with pipeline: {self.pipeline}; remove it"
                )

    def _check_offload(self, path: str, value: Any) -> None:
        device = value.get("device") if isinstance(value, Mapping) else None
        if device != "cpu":
            raise ValueError(
                f"engine.{path}: {value!r}; its device must be cpu, as checkpoints do not reach state elsewhere; write "
                "{device: cpu}, or remove it"
            )
        ratio = value.get("ratio", 1.0)
        if ratio != 1.0:
            raise ValueError(
                f"engine.{path}.ratio: {ratio!r}; must be 1.0, as checkpoints do not reach state that is kept in two "
                "places; remove it"
            )
        if self.zero_stage < OFFLOADS[path]:
            raise ValueError(
                f"engine.{path}: {value!r}; needs zero_stage {OFFLOADS[path]} or higher, and zero_stage is "
                f"{self.zero_stage}; raise it, or remove the key"
            )
        if self.pipeline > 1:
            raise ValueError(
                f"engine.{path}: {value!r}; not possible with pipeline: {self.pipeline}; remove it, or set pipeline: 1"
            )

    def _check_pipeline(self) -> None:
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"zero_stage: {self.zero_stage}; must be 0 or 1 with pipeline: {self.pipeline}, as a stage adds up "
                "the gradients of all its microbatches; set zero_stage: 1, or pipeline: 1"
            )
        if self.stages is not None and (len(self.stages) != self.pipeline or min(self.stages) < 1):
            raise ValueError(
                f"stages: {list(self.stages)}; must be {self.pipeline} numbers of blocks (pipeline: {self.pipeline}), "
                "each at least 1; correct it, or leave it out for balanced stages"
            )

    def _check_checkpointing(self) -> None:
        selections = bool(self.checkpointed_mixers) + (self.checkpointed_every is not None)
        if selections != (self.activation_checkpointing == "selective"):
            raise ValueError(
                f"activation_checkpointing: {self.activation_checkpointing}, with checkpointed_mixers: "
                f"{list(self.checkpointed_mixers)} and checkpointed_every: {self.checkpointed_every}; selective needs "
                "one of the two, none and full neither; set or remove them"
            )
        if self.checkpointed_every is not None and self.checkpointed_every < 1:
            raise ValueError(f"checkpointed_every: {self.checkpointed_every}; must be at least 1")
        unknown = [kind for kind in self.checkpointed_mixers if kind not in MIXERS]
        if unknown:
            raise ValueError(f"checkpointed_mixers: {unknown}; must be among {', '.join(MIXERS)}; correct them")


def deepspeed_config(
    parallel: ParallelConfig,
    *,
    clip_norm: float | None,
    precision: Precision,
    micro_batch_size: int,
    num_microbatches: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration: what follows from ours, and the keys `parallel.engine` adds.

    Args:
        clip_norm: the gradient is scaled down to this norm where it is larger; None: never.
        micro_batch_size: rows of a microbatch.
        num_microbatches: microbatches of a step on each rank.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision: {precision!r}; must be fp32 or bf16")
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": clip_norm if clip_norm is not None and parallel.zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW serves on a CPU, and needs no compiler
        "steps_per_print": 10**9,
        # By default each tensor rank sends a part of the stream, taken to be whole on all of them, and gathers.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if precision == "bf16":
        # No module counts as safe for low-precision reduction: by default DeepSpeed would reduce the gradients of
        # linear layers in bf16.
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merge(_merge(DEFAULTS, parallel.engine), derived)


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `override`, recursively."""
    merged = dict(base)
    for key, value in override.items():
        both_nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_nested else value
    return merged


def _paths(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every key of a nested mapping as (dotted path, value), inner mappings included."""
    paths = []
    for key, value in mapping.items():
        paths.append((f"{prefix}{key}", value))
        if isinstance(value, Mapping):
            paths += _paths(value, f"{prefix}{key}.")
    return paths
