"""A plan on one page, and as plain values."""

from collections.abc import Sequence
from typing import Any

from parallel.plan.estimate import KINDS, Estimate
from parallel.plan.hardware import GB, Hardware
from parallel.plan.search import SAFE

AXES = ("pipeline", "sequence", "tensor", "data")


def as_values(found: Estimate) -> dict[str, Any]:
    """Everything that is said of an arrangement, for `--json`: bytes, seconds, shares."""
    arrangement, split, times = found.arrangement, found.arrangement.parallel, found.times
    stage, memory = found.largest
    return {
        "pipeline": split.pipeline,
        "sequence": split.sequence,
        "tensor": split.tensor,
        "data": arrangement.data,
        "zero_stage": split.zero_stage,
        "micro_batch_size": arrangement.rows,
        "num_microbatches": arrangement.num_microbatches,
        "activation_checkpointing": checkpointing(found),
        "sequence_sharded_norms": found.sharded_norms,
        "memory": memory,
        "memory_stage": stage,
        "memory_total": found.bytes,
        "host_memory": found.host_bytes,
        "fits": found.bytes <= SAFE * found.hardware.memory,
        "communication": [
            {"axis": axis, "operation": operation, "calls": volume.calls, "bytes": volume.bytes}
            for (axis, operation), volume in sorted(found.volumes.items())
        ],
        "slowest_stage": found.slowest,
        "seconds": {**vars(times), "step": times.step},
        "bubble": times.bubble / times.step,
        "mfu": found.mfu,
        "tokens_per_second_per_gpu": arrangement.batch_size
        * found.blocks.sequence_length
        / times.step
        / arrangement.gpus,
    }


def checkpointing(found: Estimate) -> str:
    """none, full, every 2, or the mixers."""
    split = found.arrangement.parallel
    if split.checkpointed_every is not None:
        return f"every {split.checkpointed_every}"
    return "+".join(split.checkpointed_mixers) or split.activation_checkpointing


def overrides(found: Estimate) -> str:
    """What makes a run of it, as train.py takes it."""
    split, rows = found.arrangement.parallel, found.arrangement.rows
    parts = [f"parallel.{key}={getattr(split, key)}" for key in ("pipeline", "sequence", "tensor", "zero_stage")]
    parts += [f"train.micro_batch_size={rows}", f"parallel.activation_checkpointing={split.activation_checkpointing}"]
    if split.checkpointed_every is not None:
        parts.append(f"parallel.checkpointed_every={split.checkpointed_every}")
    return " ".join(parts)


def page(name: str, gpus: int, machine: Hardware, fitting: Sequence[Estimate], others: int, shown: int) -> str:
    """The fastest that fit, what they take and what they send.

    Args:
        others: how many arrangements do not fit.
        shown: rows of the table.
    """
    limit = SAFE * machine.memory / GB
    head = f"{name} on {gpus} x {machine.name}, {machine.memory / GB:.0f} GB each"
    if not fitting:
        return f"{head}: none of {others} arrangements stays within {limit:.0f} GB"
    best = fitting[0]
    lines = [
        f"{head}: {len(fitting)} arrangements stay within {limit:.0f} GB, {others} do not. Computed, not measured.",
        "",
        _rows(fitting[:shown]),
        "",
        "GB of the fullest GPU; SP and TP are sequence and tensor ranks, mb rows of a microbatch, M microbatches of a",
        "step, ckpt which blocks run twice, act activations with states of other slices, bubble the share of a step.",
        "",
        "The first, by axis, a step of its slowest stage:",
        *_sent(best),
        "",
        f"Host memory of a checkpoint under way: {best.host_bytes / GB:.2f} GB a rank.",
        f"Run it with: {overrides(best)}",
    ]
    return "\n".join(lines)


def refusal(found: Estimate) -> str:
    """What a run takes that does not fit, by kind, in one line."""
    stage, memory = found.largest
    parts = ", ".join(f"{kind} {memory[kind] / GB:.1f}" for kind in KINDS if memory[kind] >= 0.05 * GB)
    return f"{found.bytes / GB:.1f} GB on each GPU of stage {stage} ({parts})"


def _rows(found: Sequence[Estimate]) -> str:
    columns = "PP SP TP DP ZeRO mb M ckpt | total weights grads optim act logits buffers | step_s bubble MFU tok/s/GPU"
    table = [columns.split()]
    for estimate in found:
        arrangement, split = estimate.arrangement, estimate.arrangement.parallel
        _, memory = estimate.largest
        sizes = [estimate.bytes, memory["weights"], memory["gradients"], memory["optimizer"]]
        sizes += [memory["activations"] + memory["state"], memory["logits"], memory["buffers"]]
        speed = as_values(estimate)["tokens_per_second_per_gpu"]
        ranks = [split.pipeline, split.sequence, split.tensor, arrangement.data, split.zero_stage, arrangement.rows]
        times = estimate.times
        table.append(
            [
                *map(str, [*ranks, arrangement.num_microbatches]),
                checkpointing(estimate).replace(" ", ""),
                "|",
                *(f"{size / GB:.1f}" for size in sizes),
                "|",
                f"{times.step:.2f}",
                f"{times.bubble / times.step:.0%}",
                f"{estimate.mfu:.1%}",
                f"{speed:,.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table)


def _sent(found: Estimate) -> list[str]:
    lines = []
    for axis in AXES:
        parts = [
            f"{operation} {volume.bytes / GB:.2f} GB in {volume.calls:,} calls"
            for (on, operation), volume in sorted(found.volumes.items())
            if on == axis
        ]
        if parts:
            lines.append(f"  {axis:<9}" + "; ".join(parts))
    times = found.times
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in vars(times).items())
    return [*(lines or ["  nothing"]), f"  seconds  {seconds}"]
