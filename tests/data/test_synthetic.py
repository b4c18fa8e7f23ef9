"""The recall task: what a row holds, that rows differ, and that the loader serves them as it serves a corpus."""

import numpy as np
import pytest
import torch

from data.config import CorpusConfig, DataConfig
from data.corpus import check_data
from data.loader import Loader, validation_batches
from data.synthetic import NO_TARGET, VALID_ROWS, Recall, SyntheticRows

VOCAB = 40


def config(**changes: object) -> DataConfig:
    values = {"source": "synthetic:recall", "options": {"pairs": 5}, "sequence_length": 33} | changes
    return DataConfig(**values)


def rows(split: str, seed: int = 0) -> SyntheticRows:
    settings = {"pairs": 5}
    return SyntheticRows(
        "synthetic:recall",
        settings,
        split=split,
        seed=seed,
        sequence_length=33,
        vocab_size=VOCAB,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("row", range(5))
def test_every_target_was_shown_and_nothing_else_is_asked(row: int) -> None:
    input_ids, labels, positions = rows("train")[row]
    shown = dict(zip(input_ids[0:10:2].tolist(), input_ids[1:10:2].tolist()))
    assert len(shown) == 5
    assert max(shown) < VOCAB // 2 <= min(shown.values())
    asked = [t for t in range(33) if labels[t] != NO_TARGET]
    assert asked == list(range(10, 33, 2))
    assert all(labels[t] == shown[int(input_ids[t])] for t in asked)
    assert (input_ids[1:][labels[:-1] >= 0] == labels[:-1][labels[:-1] >= 0]).all(), "the answer follows its question"
    assert {int(input_ids[t]) for t in asked[:5]} == shown.keys(), "every key is asked for once a round"
    assert positions.tolist() == list(range(33))


def test_rows_are_a_function_of_seed_split_and_number() -> None:
    assert np.array_equal(rows("train")[7], rows("train")[7])
    others = [rows("train")[8], rows("valid")[7], rows("train", seed=1)[7]]
    assert all(not np.array_equal(rows("train")[7], other) for other in others)


def test_the_loader_serves_it_on_any_number_of_ranks() -> None:
    def step(dp_size: int, consumed: int) -> torch.Tensor:
        parts = []
        for rank in range(dp_size):
            loader = Loader(
                config(),
                split="train",
                batch_size=8,
                micro_batch_size=2,
                dp_rank=rank,
                dp_size=dp_size,
                vocab_size=VOCAB,
            )
            batches = loader.batches(consumed)
            parts += [row for batch in next(batches) for row in batch.input_ids.tolist()]
            batches.close()
        return torch.tensor(sorted(parts))

    assert torch.equal(step(1, 16), step(2, 16))
    assert not torch.equal(step(1, 16), step(1, 24))


def test_validation_reads_its_own_rows_once() -> None:
    batches = list(
        validation_batches(config(), micro_batch_size=64, dp_rank=0, dp_size=1, max_sequences=None, vocab_size=VOCAB)
    )
    assert sum(len(batch.input_ids) for batch in batches) == VALID_ROWS
    assert check_data(config(), VOCAB) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source": "synthetic:recal"},
            r"source: 'synthetic:recal'; there is no such task; did you mean synthetic:recall",
        ),
        ({"source": "recall"}, "choose from synthetic:recall"),
        ({"options": {"pears": 3}}, r"options: \['pears'\]; synthetic:recall takes pairs"),
        ({"corpora": (CorpusConfig(path="a"),)}, "corpora: .* generates its data; remove one of the two"),
        ({"tokenizer": "a.model"}, "tokenizer: 'a.model'; source synthetic:recall generates"),
        ({"source": None, "corpora": (CorpusConfig(path="a"),)}, r"options: .* corpora have none"),
    ],
)
def test_impossible_sources_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("pairs", "length", "message"),
    [
        (21, 100, r"data\.options\.pairs: 21; must be 1 to half"),
        (5, 11, r"data\.sequence_length: 11; must hold 5 pairs"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(pairs: int, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(pairs=pairs).check(length, VOCAB)
