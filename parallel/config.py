"""How a run is spread over ranks, as frozen data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

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
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.compute_grad_norm": "the log, which reports the gradient norm of every step",
}
"""DeepSpeed keys that Rondo sets, each with what decides it."""

UNSUPPORTED_KEYS = {
    "zero_optimization.offload_optimizer": "checkpoints do not reach moments outside the device",
    "zero_optimization.offload_param": "it needs ZeRO 3",
}
"""DeepSpeed keys that cannot work here, each with the reason."""


DEFAULTS = {
    "zero_optimization": {"reduce_bucket_size": 50_000_000},  # 200 MB; DeepSpeed's own default takes 2 GB of a GPU
    "timers": {"throughput": {"enabled": False}},  # it waits for the device around every forward pass
}
"""DeepSpeed keys whose defaults do not serve; `engine` may change them."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """
    Attributes:
        sequence: ranks that share each row, a slice of its tokens each.
        tensor: ranks that share each layer, some of its heads, channels and hidden units each. What is left of the
            ranks works on different rows.
        zero_stage: what the data-parallel ranks split among them: 0 nothing, 1 optimizer moments and master weights,
            2 gradients besides.
        timeout_minutes: how long a rank waits for the others before it gives up.
        engine: further DeepSpeed configuration, passed through as it is, for example
            `{zero_optimization: {overlap_comm: true}}`.
    """

    sequence: int = 1
    tensor: int = 1
    zero_stage: int = 1
    timeout_minutes: float = 30.0
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("sequence", "tensor"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; must be at least 1")
        if self.zero_stage not in (0, 1, 2):
            raise ValueError(f"zero_stage: {self.zero_stage}; must be 0, 1 or 2")
        if self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes: {self.timeout_minutes}; must be positive")
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
            if path in UNSUPPORTED_KEYS:
                raise ValueError(f"engine.{path}: {value!r}; not possible, {UNSUPPORTED_KEYS[path]}; remove it")


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
        "steps_per_print": 10**9,
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
