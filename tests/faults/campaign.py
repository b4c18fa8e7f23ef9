"""A run that suffers one fault after the other, and what must be true of each start that follows one."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.checkpoint import list_checkpoints, step_of
from tests.faults.job import ROOT, Job, Kill

TINY = ROOT / "tests" / "assets" / "tiny.yaml"
EVERY = 2
SETTINGS = [
    f"checkpoint.every={EVERY}",
    "checkpoint.keep_last=3",
    "checkpoint.keep_every=10",
    "eval.every=null",
    "eval.prompts=[]",
    "optimizer.lr=0.001",
    "train.micro_batch_size=4",
]
RANKS = 2

KILLS = ("one rank in training", "all ranks in training", "one rank in a save", "all ranks in a save")
DAMAGE = ("truncated file", "flipped bit", "missing file", "two damaged checkpoints")
DISKS = ("full disk", "read-only disk", "disk of one rank full")
KINDS = (*KILLS, *DAMAGE, *DISKS)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def losses_of(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line of a step, repeated steps repeated."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows_of(run) if "loss" in row]


def state_of(path: Path) -> tuple:
    """Tells one checkpoint from another in its place."""
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.iterdir()))


class Campaign:
    """Faults on the run `name` below `directory`, drawn from `rng`, each checked against `reference`.

    Args:
        reference: step -> (loss, gradient norm) of a run of as many steps that nothing disturbed.
        steps: of the run.
    """

    def __init__(
        self, directory: Path, name: str, corpus: Path, reference: dict[int, tuple], steps: int, rng: random.Random
    ) -> None:
        self.run = directory / name
        self.checkpoints = self.run / "checkpoints"
        self.tally: Counter[str] = Counter()
        self.skipped = 0
        self.finished = False
        self._scratch = directory
        self._reference = reference
        self._rng = rng
        self._seen = 0
        self._damaged: dict[Path, tuple] = {}
        paths = [f"log.directory={directory}", f"data.corpora=[{{path: {corpus}}}]", f"name={name}"]
        self._arguments = [str(TINY), *paths, f"train.steps={steps}", *SETTINGS]

    def suffer(self, kind: str) -> None:
        """One start that ends in a fault, its checks, and what is left damaged for the next start to find.

        A fault that finds nothing to spoil, or a run that ends before it comes, does not count.
        """
        if kind in DISKS and list_checkpoints(self.checkpoints):
            happened = self._suffer_disk(kind)
        else:
            happened = self._suffer_kill(kind) and kind not in DISKS
            if kind in DAMAGE and not self.finished:
                happened = self._damage(kind)
        self.tally[kind] += happened

    def finish(self) -> None:
        """A last start, undisturbed: the run ends where the reference does."""
        if not self.finished:
            self._check(self._start().wait(), whole=True)
        assert self.finished
        assert max(step for step, _, _ in losses_of(self.run)) == max(self._reference)

    def _good_ones(self) -> list[Path]:
        """The checkpoints that are as a run wrote them, oldest first; one in a damaged one's place is another."""
        return [p for p in list_checkpoints(self.checkpoints) if self._damaged.get(p) != state_of(p)]

    def _start(self, **how: Any) -> Job:
        self._good = self._good_ones()
        self._newer = (
            [path for path in list_checkpoints(self.checkpoints) if path > self._good[-1]] if self._good else []
        )
        self._job = Job(self._arguments, RANKS, self._scratch, **how)
        return self._job

    def _suffer_kill(self, kind: str) -> bool:
        ranks = list(range(RANKS)) if kind.startswith("all") else [self._rng.randrange(RANKS)]
        if kind.endswith("in a save"):
            # Operations of a save: about forty of the lead and five of another rank; one of the first few saves.
            victim = ranks[0] if len(ranks) == 1 else 0
            after = self._rng.randrange(1, 160 if victim == 0 else 20)
            job = self._start(kill=Kill(victim, after, self._rng.choice((0.0, 0.0, self._rng.uniform(0.0, 0.02)))))
        else:
            rows, job = len(rows_of(self.run)), self._start()
            more = self._rng.randrange(2, 14)
            while all(job.alive) and len(rows_of(self.run)) < rows + more:
                time.sleep(0.005)
            time.sleep(self._rng.uniform(0.0, 0.2))
            job.kill(ranks)
        self._check(job.wait())
        return not self.finished

    def _suffer_disk(self, kind: str) -> bool:
        before = list_checkpoints(self.checkpoints)
        alone = kind == "disk of one rank full"
        disk = contextlib.nullcontext() if alone else small_disk(self.checkpoints, read_only=kind == "read-only disk")
        with disk:
            code = self._start(small_files=1 if alone else None).wait()
            saved = self._check(code)
        if self.finished:
            return False
        said = self._job.said()
        assert set(code) == {1}, said
        (line,) = (line for line in said.splitlines() if line.startswith("train.py: ") and "skipped" not in line)
        reason = {"full disk": errno.ENOSPC, "read-only disk": errno.EROFS}.get(kind, errno.EFBIG)
        assert os.strerror(reason) in line, said
        assert ": not saved: rank " in line, said
        assert line.endswith("older checkpoints are intact: mend this and start the run again"), said
        if not saved:
            assert list_checkpoints(self.checkpoints) == before
        return True

    def _check(self, code: list[int], *, whole: bool = False) -> set[Path]:
        """What must be true of the start that has ended; returns the checkpoints that it saved."""
        job, rows = self._job, rows_of(self.run)[self._seen :]
        self._seen += len(rows)
        said = job.said()
        assert "Traceback" not in said or set(code) & {-9}, said
        if whole:
            assert set(code) == {0}, said
        for path in self._newer:
            assert f"train.py: skipped {path}" in said or not rows, f"{path} of {self._good}; {said}"
        for step, loss, norm in ((row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row):
            assert (loss, norm) == self._reference[step], f"step {step} of another curve; {self._good}"
        begun = [row for row in rows if row.get("event") in ("resumed", "started")]
        if begun:
            wanted = step_of(self._good[-1]) if self._good else 0
            assert [row["step"] for row in begun] == [wanted], f"{begun}, but {self._good} are good"
            self.skipped += len(self._newer)
        self.finished = any(row.get("event") == "finished" for row in rows)
        return {self.checkpoints / f"step_{row['step']:08d}" for row in rows if row.get("event") == "saved"}

    def _damage(self, kind: str) -> bool:
        """Damages the newest checkpoint, or the two newest, if a good one is left then; whether it did."""
        count = 2 if kind.startswith("two") else 1
        good = self._good_ones()
        if len(good) <= count:
            return False
        for path in good[-count:]:
            file = self._rng.choice(sorted(path.iterdir()))
            if kind == "missing file":
                file.unlink()
            elif kind == "truncated file":
                os.truncate(file, self._rng.randrange(file.stat().st_size))
            else:
                content = bytearray(file.read_bytes())
                bit = self._rng.randrange(8 * len(content))
                content[bit // 8] ^= 1 << bit % 8
                file.write_bytes(content)
            self._damaged[path] = state_of(path)
        return True


@contextlib.contextmanager
def small_disk(directory: Path, *, read_only: bool) -> Iterator[None]:
    """Puts what `directory` holds on a file system of its own that has room for 64 KiB more, or can only be read."""
    directory.mkdir(exist_ok=True)
    aside = directory.with_name("aside")
    shutil.copytree(directory, aside, symlinks=True)
    used = sum(-(-path.lstat().st_size // 4096) + 1 for path in aside.rglob("*")) * 4
    mount("-t", "tmpfs", "-o", f"size={used + 64}k", "tmpfs", directory)
    try:
        shutil.copytree(aside, directory, symlinks=True, dirs_exist_ok=True)
        if read_only:
            mount("-o", "remount,ro", directory)
        yield
        if read_only:
            mount("-o", "remount,rw", directory)
        shutil.rmtree(aside)
        shutil.copytree(directory, aside, symlinks=True)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
    shutil.rmtree(directory)
    aside.rename(directory)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def may_mount(directory: Path) -> bool:
    """Whether this process may mount file systems, for which it must be root."""
    tried = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], capture_output=True, check=False)
    if tried.returncode == 0:
        subprocess.run(["umount", str(directory)], check=True)
    return tried.returncode == 0
