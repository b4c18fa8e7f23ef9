"""Tasks between two steps of a run, on ranks that may each hold a part of the model, of the rows, or of the layers.

Every rank asks the same in the same order. Rows are packed into the rows that the run trains on, several documents in
one, and dealt to the data ranks; what each finds is summed over them, so that all end with all scores. Nothing is taken
from the training data or from a global generator.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.schema import RunConfig
from data.loader import Batch
from data.synthetic import NO_TARGET
from data.tokenizer import Tokenizer
from eval.model import LocalModel, Row, Scores, check_rows
from eval.sampling import Sampling
from eval.stops import TextStream
from eval.tasks import TASKS, check_task, make_task
from eval.tasks.task import Task
from models.lm import LM


def tasks_of(run: RunConfig, tokenizer_path: Path | None) -> dict[str, Task]:
    """The tasks of a run by name, of this tree and of lm-eval; none where `eval.tasks` has none.

    Raises:
        ValueError: one is unknown, has a setting that it cannot have, or cannot be asked between steps of this run.
    """
    settings = run.eval
    for name in settings.task_options:
        if name not in settings.tasks or name not in TASKS:
            raise ValueError(
                f"eval.task_options.{name}: settings, but no task of this tree with that name is in eval.tasks "
                f"({', '.join(settings.tasks)}); correct the name or remove them"
            )
    split, rule = run.parallel.sequence, "parallel.sequence"
    if run.parallel.sequence_sharded_norms:
        split, rule = split * run.parallel.tensor, "parallel.sequence x parallel.tensor"
    if settings.tasks and longest_row(run) % split:
        raise ValueError(
            f"eval.tasks_length: {longest_row(run)}; must be a multiple of {rule} ({split}): choose e.g. "
            f"{-(-longest_row(run) // split) * split}"
        )
    theirs = [name for name in settings.tasks if name not in TASKS]
    found = _theirs(theirs, settings.tasks_include) if theirs else {}
    tasks: dict[str, Task] = {}
    for name in settings.tasks:
        try:
            task = found[name] if name in found else make_task(name, settings.task_options.get(name, {}))
            check_task(name, task, run.model.vocab_size, longest_row(run))
        except ValueError as error:
            raise ValueError(f"eval.task_options.{error}" if name in TASKS else str(error)) from None
        if task.reads_text and tokenizer_path is None:
            raise ValueError(
                f"eval.tasks: {name} needs text, but the data have no tokenizer; set data.tokenizer or remove the task"
            )
        if task.generates and not getattr(task, "greedy", False) and not holds_whole_model(run):
            raise ValueError(
                f"eval.tasks: {name} continues prompts with tokens that it draws, but no rank holds the whole model or "
                "row under parallel.pipeline, parallel.sequence, parallel.tensor or ZeRO 3; remove it, and ask it of "
                "a checkpoint (python -m eval)"
            )
        tasks[name] = task
    return tasks


def _theirs(names: Sequence[str], include: str | None) -> dict[str, Task]:
    from eval.harness_tasks import harness_tasks

    return dict(harness_tasks(names, None if include is None else Path(include)))


def longest_row(run: RunConfig) -> int:
    """The most tokens of a row that a task may ask about in the loop."""
    return run.eval.tasks_length or run.data.sequence_length


def holds_whole_model(run: RunConfig) -> bool:
    """Whether every rank has all parameters and whole rows."""
    split = run.parallel
    return split.pipeline * split.sequence * split.tensor == 1 and split.zero_stage < 3


class LoopModel:
    """`eval.model.EvalModel` over the engine of a run. All methods are collective.

    Args:
        judge: the engine's: a batch's nll and the most likely token at each place, `[B, T]` each, given how many tokens
            to choose from, None for all.
        add_up: sums a float64 vector over the data ranks.
        collect: everybody's object, by data rank.
        data_rank, data_ranks: this rank's place along the data axis, and how many there are.
        rows: of a batch.
        longest: tokens of a batch's rows.
        whole: the model where every rank holds all of it, which continues prompts through its state; None elsewhere.
    """

    def __init__(
        self,
        judge: Callable[[Batch, int | None], tuple[Tensor, Tensor]],
        *,
        add_up: Callable[[Tensor], Tensor],
        collect: Callable[[Any], Sequence[Any]],
        data_rank: int,
        data_ranks: int,
        rows: int,
        longest: int,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        whole: LM | None,
    ) -> None:
        self._judge, self._add_up, self._collect = judge, add_up, collect
        self._data_rank, self._data_ranks, self._rows = data_rank, data_ranks, rows
        self.longest: int | None = longest
        self._time, self._entries, self.tokenizer, self._whole = longest, vocab_size, tokenizer, whole
        self.vocab_size = vocab_size if tokenizer is None else tokenizer.vocab_size
        self.generates = True

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        check_rows(rows, self._entries, self.longest, "shorten the row, or raise eval.tasks_length")
        return [Scores(nll, row.labels == best) for row, (nll, best) in zip(rows, self._look(rows, None))]

    def _look(self, rows: Sequence[Row], among: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each row its nll and the most likely tokens, float64 `[T]` each."""
        ends = np.cumsum([len(row.labels) for row in rows], dtype=np.int64)
        found = torch.zeros(2, int(ends[-1]) if rows else 0, dtype=torch.float64)
        packed = pack([len(row.labels) for row in rows], self._time)
        at_once = self._rows * self._data_ranks
        for start in range(0, len(packed), at_once):
            mine = packed[start + self._data_rank * self._rows :][: self._rows]
            batch, places = self._batch(rows, mine if start + self._data_rank * self._rows < len(packed) else [])
            nll, best = (part.double().cpu() for part in self._judge(batch, among))
            for n, first, i in places:
                size = len(rows[i].labels)
                here = slice(int(ends[i]) - size, int(ends[i]))
                found[0, here], found[1, here] = nll[n, first : first + size], best[n, first : first + size]
        found = self._add_up(found)
        parts = found.numpy()
        starts = ends - np.array([len(row.labels) for row in rows], dtype=np.int64)
        return [(parts[0, a:b], parts[1, a:b]) for a, b in zip(starts, ends)]

    def _batch(self, rows: Sequence[Row], packed: list[list[int]]) -> tuple[Batch, list[tuple[int, int, int]]]:
        """Packed rows as a batch, and where in it (row, first token) which of `rows` stands."""
        input_ids = np.zeros((self._rows, self._time), dtype=np.int64)
        labels = np.full_like(input_ids, NO_TARGET)
        positions = np.tile(np.arange(self._time), (self._rows, 1))
        places = []
        for n, members in enumerate(packed):
            first = 0
            for i in members:
                here = slice(first, first + len(rows[i].labels))
                input_ids[n, here], labels[n, here] = rows[i]
                places.append((n, first, i))
                first = here.stop
                positions[n, first:] = np.arange(self._time - first)  # a document of its own, or padding
        return Batch(*map(torch.from_numpy, (input_ids, labels, positions))), places

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        if self._whole is None:
            added: list[list[int]] = [[] for _ in prompts]

            def take(row: int, token: int) -> bool:
                added[row].append(token)
                return True

            self._greedily(prompts, sampling, take)
            return added
        return self._shared(lambda model, mine: model.generate(mine, sampling), prompts)

    def generate_texts(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stops: Sequence[str] = ()
    ) -> list[str]:
        if self._whole is None:
            assert self.tokenizer is not None, "`tasks_of` refuses tasks that need text without one"
            streams = [TextStream(self.tokenizer.decode, stops) for _ in prompts]
            texts = [""] * len(prompts)

            def take(row: int, token: int) -> bool:
                texts[row] += streams[row].feed(token)
                return not streams[row].stopped

            self._greedily(prompts, sampling, take)
            return [text + stream.close() for text, stream in zip(texts, streams)]
        return self._shared(lambda model, mine: model.generate_texts(mine, sampling, stops), prompts)

    def _greedily(self, prompts: Sequence[Sequence[int]], sampling: Sampling, take: Callable[[int, int], bool]) -> None:
        """Hands `take` each row's most likely next token until it has had enough, EOS, or max_tokens.

        Ranks that hold parts keep no state between looks: every row is read anew for every token.
        """
        assert sampling.temperature == 0, "`tasks_of` refuses tasks that draw"
        assert sampling.repetition_penalty == 1, "`tasks_of` refuses tasks that draw"
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        rows = [list(prompt) for prompt in prompts]
        for i, row in enumerate(rows):
            if not row or len(row) + sampling.max_tokens - 1 > self._time:
                raise ValueError(
                    f"prompts[{i}]: {len(row)} tokens and {sampling.max_tokens} to add; must be at least one, and fit "
                    f"in {self._time} between steps of this run; shorten the prompt, or raise eval.tasks_length"
                )
        running = list(range(len(rows)))
        for _ in range(sampling.max_tokens if rows else 0):
            looks = self._look([_asked_at_its_end(rows[i]) for i in running], self.vocab_size)
            tokens = [int(best[-1]) for _, best in looks]
            for i, token in zip(running, tokens):
                rows[i].append(token)
            running = [i for i, token in zip(running, tokens) if token != eos_id and take(i, token)]
            if not running:
                return

    def _shared(self, function: Callable[[LocalModel, list[Any]], list[Any]], prompts: Sequence[Any]) -> list[Any]:
        """Each data rank's share of the prompts, continued, and everybody's put together again."""
        assert self._whole is not None
        training = self._whole.training
        local = LocalModel(self._whole, self.tokenizer, batch_size=self._rows)
        try:
            mine = list(prompts[self._data_rank :: self._data_ranks])
            results: list[Any] = [None] * len(prompts)
            for rank, part in enumerate(self._collect(function(local, mine) if mine else [])):
                results[rank :: self._data_ranks] = part
        finally:
            self._whole.train(training)
        return results


def _asked_at_its_end(tokens: Sequence[int]) -> Row:
    """The row whose only label, of any token, is the one after its last."""
    labels = np.full(len(tokens), NO_TARGET)
    labels[-1] = 0
    return Row(np.asarray(tokens, dtype=np.int64), labels)


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of `lengths` in bins of `size`, the longest first into the first bin with room (first fit decreasing)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((n for n, left in enumerate(room) if left >= lengths[i]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(size)
        bins[place].append(i)
        room[place] -= lengths[i]
    return bins


def task_metrics(tasks: Mapping[str, Task], model: LoopModel) -> dict[str, Any]:
    """Every metric of every task, as `task/<name>/<metric>`. Collective."""
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        for metric, value in task.evaluate(model).items():
            found[f"task/{name}/{metric}"] = value
    return found


def in_words(metrics: Mapping[str, Any]) -> str:
    """Each task's first metric, for a line of the log."""
    first: dict[str, str] = {}
    for key, value in metrics.items():
        _, name, metric = key.split("/", 2)
        if isinstance(value, int | float):
            first.setdefault(name, f"{name} {metric} {value:.4g}")
    return ", ".join(first.values())
