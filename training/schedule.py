"""The learning rate as a pure function of the step."""

import math

from training.config import ScheduleConfig


def learning_rate(step: int, *, peak: float, total_steps: int, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step`, counted from 0 to total_steps - 1; the last step has the final rate."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    start = schedule.warmup_steps if schedule.kind == "cosine" else total_steps - (schedule.decay_steps or 0)
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, total_steps - start)))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - math.sqrt(progress)
    return peak * (schedule.final_fraction + (1.0 - schedule.final_fraction) * shape)
