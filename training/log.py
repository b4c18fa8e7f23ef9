"""The run directory's writer: config, environment, metrics, text log, progress bar, Weights & Biases."""

import json
import time
import uuid
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.config import WandbConfig


class RunLog:
    """Writes `metrics.jsonl` and `log.txt` below `directory` and shows progress; does nothing where `active` is false.

    Args:
        directory: the run directory.
        active: true on the one rank that writes.
        total_steps, first_step: for the progress bar.
        wandb: settings of Weights & Biases; None leaves it out, and then it is not imported.
        config: the resolved run, for Weights & Biases.
    """

    def __init__(
        self,
        directory: Path,
        *,
        active: bool,
        total_steps: int,
        first_step: int = 0,
        wandb: WandbConfig | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.active = active
        self._wandb: Any = None
        if not active:
            return
        metrics = directory / "metrics.jsonl"
        torn = metrics.exists() and metrics.read_bytes()[-1:] not in (b"", b"\n")  # the writer was killed in a line
        self._metrics = open(metrics, "a", encoding="utf-8")  # noqa: SIM115
        if torn:
            self._metrics.write("\n")
        self._text = open(directory / "log.txt", "a", encoding="utf-8")  # noqa: SIM115
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, desc=directory.name)
        if wandb is not None and wandb.mode != "disabled":
            self._wandb = _start_wandb(wandb, directory, config)

    def say(self, text: str) -> None:
        """A line, or several, for the reader: terminal and `log.txt`."""
        if self.active:
            tqdm.write(text)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._text.write("".join(f"{stamp} {line}\n" for line in text.splitlines()))
            self._text.flush()

    def metrics(self, values: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`; `values` names its `step`."""
        if self.active:
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
            if self._wandb is not None:
                self._wandb.log({key: value for key, value in values.items() if isinstance(value, int | float)})

    def event(self, step: int, event: str, detail: str = "", **values: Any) -> None:
        """Something that happened to the run, in `metrics.jsonl`, with `values`, and for the reader."""
        self.metrics({"step": step, "event": event, "detail": detail, **values})
        self.say(f"step {step}: {event} {detail}".rstrip())

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """So many steps are done; fewer than before where the run went back."""
        if self.active:
            self._bar.set_postfix({"loss": f"{loss:.3f}", "tok/s": f"{tokens_per_second:,.0f}"}, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._metrics.close()
            self._text.close()
            if self._wandb is not None:
                self._wandb.finish()


def _start_wandb(settings: WandbConfig, directory: Path, config: dict[str, Any] | None) -> Any:
    """The run at Weights & Biases; one that is resumed goes on there under the id kept in the run directory.

    Raises:
        ValueError: it cannot be reached, or wants a key.
    """
    import wandb

    kept = directory / "wandb_id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex, encoding="utf-8")
    try:
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=directory.name,
            id=kept.read_text(encoding="utf-8"),
            resume="allow" if settings.mode == "online" else None,
            dir=str(directory),
            config=config,
        )
    except wandb.Error as error:
        raise ValueError(
            f"log.wandb: {settings.mode} run of project {settings.project!r} cannot start ({error}); log in with "
            "`wandb login`, or set log.wandb.mode to offline"
        ) from error
    run.define_metric("*", step_metric="step")  # steps come twice after a resume, which wandb's own counter forbids
    return run


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as aligned text; numbers to the right, with thousands separators."""
    keys = list(rows[0])
    cells = [[f"{row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in keys] for row in rows]
    widths = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(keys)]
    right = [isinstance(rows[0][key], int) for key in keys]
    lines = [
        "  ".join(cell.rjust(width) if flush else cell.ljust(width) for cell, width, flush in zip(line, widths, right))
        for line in [keys, *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)
