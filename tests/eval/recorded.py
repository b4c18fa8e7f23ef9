"""A run directory as train.py leaves one: killed at step 230, resumed from step 150, finished at step 400."""

import json
import math
from pathlib import Path
from typing import Any

BUCKETS = [0, 1, 2, 4, 8, 16, 32, 64, 128]
LAYERS = [
    {"layer": "embed", "mixer": "", "impl": "", "parameters": 4096, "flops_per_token": 0},
    {"layer": "blocks.0", "mixer": "rglru", "impl": "chunked", "parameters": 2_000_000, "flops_per_token": 4_000_000},
    {"layer": "blocks.1", "mixer": "local_attention", "impl": "chunked", "parameters": 904, "flops_per_token": 900_000},
]


def training_row(step: int, loss: float | None = None) -> dict[str, Any]:
    noise = math.sin(37.0 * step)
    return {
        "step": step,
        "consumed_samples": 8 * step,
        "tokens": 2048 * step,
        "loss": loss if loss is not None else 2.0 + 6.0 * math.exp(-step / 60) + 0.1 * noise,
        "z_loss": 60.0 + noise,
        "grad_norm": math.exp(0.3 * noise),
        "lr": 1e-3 * min(1.0, step / 50),
        "tokens_per_second": 5000.0 + 100.0 * noise,
        "step_time": 0.4,
        "memory_gb": 0.9,
        "mfu": None,
    }


def validation_row(step: int) -> dict[str, Any]:
    loss = 2.1 + 6.0 * math.exp(-step / 60)
    by_position = [[a, b, loss + 1.0 / (1 + a)] for a, b in zip(BUCKETS, BUCKETS[1:], strict=False)]
    bits = {"val_bits_per_byte": loss / 1.5, "val_tokens": 1000}
    return {"step": step, "val_loss": loss, **bits, "val_loss_by_position": by_position}


def rows(first: int, last: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        found.append(training_row(step))
        if step % 50 == 0:
            found += [validation_row(step), {"step": step, "event": "saved", "detail": f"step_{step:08d}"}]
    return found


def write_metrics(directory: Path, metrics: list[dict[str, Any]], torn: str = "") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in metrics) + torn
    (directory / "metrics.jsonl").write_text(text)


def record_run(directory: Path) -> Path:
    started = {"step": 0, "event": "started", "detail": ""}
    resumed = {"step": 150, "event": "resumed", "detail": "from step_00000150"}
    finished = {"step": 400, "event": "finished", "detail": "in <1> hour"}
    write_metrics(directory, [started, *rows(1, 230), resumed, *rows(151, 400), finished])
    (directory / "layers.json").write_text(json.dumps(LAYERS))
    (directory / "config.yaml").write_text("name: recorded\ntrain: {steps: 400}\n")
    environment = {"git_diff": "-a < b\n+a > b\n", "packages": {"torch": "2.13.0"}, "topology": {"world_size": 2}}
    (directory / "environment.json").write_text(json.dumps(environment))
    (directory / "samples").mkdir()
    for step in (200, 400):
        (directory / "samples" / f"step_{step:08d}.txt").write_text(f"sample of step {step}: if a < b & c:\n\tpass\n")
    return directory
