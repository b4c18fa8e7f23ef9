"""The run directory: held by one job at a time, and told how that job ended."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from training.ending import MARKER, Reason, refusal_of, write_ending
from training.lock import LockError, hold

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

        Whatever is made here goes again with the context unless it has become a run: what is refused leaves nothing
        but its reason, beside.

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
            for marker in (self.path / MARKER, self.path.parent / refusal_of(self.path)):
                marker.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"log.directory: {str(self.path.parent)!r}; {self.path} cannot be made and written to "
                f"({error.strerror}); name a directory that can be written to"
            ) from error

    @property
    def holds_run(self) -> bool:
        return (self.path / "config.yaml").exists()

    def end(self, reason: Reason, detail: str, *, resumable: bool) -> None:
        """Marks how the run ended; how the start did, beside, where there is none. A failure is for any rank to say,
        the rest for the lead."""
        if self.holds_run and (self._lead or reason == "failed"):
            write_ending(self.path, reason, detail, step=self.step, resumable=resumable)
        elif reason == "failed":
            name = refusal_of(self.path)
            with suppress(OSError):  # said on stderr in any case
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_ending(self.path.parent, reason, detail, step=self.step, resumable=resumable, name=name)

    def refuse(self, detail: str) -> None:
        """Marks why a start ended that has not claimed the directory, for the lead to say; a directory where another
        job trains stays as it is."""
        if not self._lead:
            return
        try:
            self.claim()
        except LockError:
            return
        except ValueError:  # cannot be made
            pass
        self.end("failed", detail, resumable=False)

    @contextmanager
    def refusals_marked(self) -> Iterator[None]:
        """Marks what a start is refused for inside, up to the claim."""
        try:
            yield
        except ValueError as error:
            self.refuse(str(error))
            raise

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


def tell_of_refusal(path: str | Path | None, reason: str) -> None:
    """What is left to say where a run is refused before any rank has met another; nothing if its directory is not
    known."""
    if path is not None:
        with RunDirectory(Path(path), lead=True) as directory:
            directory.refuse(reason)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: whoever is killed meanwhile leaves the earlier one."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):  # somebody's file is in it
        path.rmdir()
