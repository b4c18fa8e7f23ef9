"""The run directory: held by one job at a time, and told how that job ended."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from training.ending import MARKER, Reason, write_ending
from training.lock import hold

LOCK = ".lock"

NO_RUN = (LOCK, f"{LOCK}.owner", MARKER)
"""Files that do not make a run of a directory."""


class RunDirectory:
    """One job's hold on `path`, a context, from `claim` to the end.

    Args:
        path: the run directory.
        lead: true on the one rank that holds the lock for all.

    Attributes:
        step: the last completed step, kept up to date by the loop.
    """

    def __init__(self, path: Path, *, lead: bool) -> None:
        self.path = path
        self.step = 0
        self._lead = lead
        self._guard = ExitStack()

    def claim(self) -> None:
        """Makes and locks the directory, and removes the mark of an earlier end.

        Whatever is made here goes again with the context unless it has become a run: what is refused leaves nothing.

        Raises:
            LockError: another job is training here.
            ValueError: the directory cannot be made.
        """
        if not self._lead:
            return
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in reversed(missing):
                self._guard.callback(_remove_if_empty, path)
            hold(self.path / LOCK, self._guard, doing="training")
            self._guard.callback(self._remove_what_is_no_run)
            (self.path / MARKER).unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"log.directory: {str(self.path.parent)!r}; {self.path} cannot be made and written to "
                f"({error.strerror}); name a directory that can be written to"
            ) from error

    @property
    def holds_run(self) -> bool:
        return (self.path / "config.yaml").exists()

    def end(self, reason: Reason, detail: str, *, resumable: bool) -> None:
        """Marks how the run ended. A failure is for any rank to say, the rest for the lead."""
        if self.holds_run and (self._lead or reason == "failed"):
            write_ending(self.path, reason, detail, step=self.step, resumable=resumable)

    @contextmanager
    def failures_marked(
        self,
        *,
        explain: Callable[[Exception], str | None] = lambda error: None,
        tell: Callable[[int, str, str], None] = lambda step, event, detail: None,
    ) -> Iterator[None]:
        """Marks what goes wrong inside. To be entered when all ranks know that the claim is good.

        Args:
            explain: puts an error of these ranks in better words than its own, or returns None.
            tell: called besides with the last completed step, "failed" and the words.
        """
        try:
            yield
        except Exception as error:
            lost = isinstance(error, RuntimeError | ConnectionError)  # a rank, a device, the network
            detail = explain(error) or f"{type(error).__name__}: {error}"
            self.end("failed", detail, resumable=lost)
            tell(self.step, "failed", detail)
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *error: object) -> None:
        self._guard.close()

    def _remove_what_is_no_run(self) -> None:
        if not self.holds_run:
            for name in NO_RUN:
                (self.path / name).unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: whoever is killed meanwhile leaves the earlier one."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):  # somebody's file is in it
        path.rmdir()
