"""Splits that cannot be: one clear error through train.py, before anything is built or written."""

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

from parallel.grid import Grid

ASSETS = Path(__file__).resolve().parent.parent / "assets"
CASES: dict[str, tuple[list[str], str]] = {
    "world": (["parallel.tensor=3"], "parallel.tensor: 1 x 1 x 3; must divide the 2 ranks: choose"),
    "layers": (
        ["parallel.pipeline=2", "model.layers=[rglru]"],
        "parallel.pipeline: 2; must be at most the 1 blocks of model.layers, as each stage needs one: choose among 1",
    ),
    "stages of another depth": (
        ["parallel.pipeline=2", "parallel.stages=[2, 2]"],
        "parallel.stages: [2, 2]; these are 4 blocks, but model.layers has 3; choose e.g. [2, 1]",
    ),
    "stages of another number": (
        ["parallel.pipeline=2", "parallel.stages=[1, 1, 1]"],
        "parallel.stages: [1, 1, 1]; must be 2 numbers of blocks (pipeline: 2), each at least 1; correct it",
    ),
    "ZeRO 2 with stages": (
        ["parallel.pipeline=2", "parallel.zero_stage=2"],
        "parallel.zero_stage: 2; must be 0 or 1 with pipeline: 2,",
    ),
    "ZeRO 3 with stages": (
        ["parallel.pipeline=2", "parallel.zero_stage=3"],
        "parallel.zero_stage: 3; must be 0 or 1 with pipeline: 2,",
    ),
    "checkpointed mixers": (
        ["parallel.activation_checkpointing=selective", "parallel.checkpointed_mixers=[hgrn2]"],
        "parallel.checkpointed_mixers: ['hgrn2']; must be mixers of model.layers, which has rglru, local_attention",
    ),
    "blocks": (
        ["parallel.tensor=2", "model.mixers.rglru.gate_blocks=1"],
        "parallel.tensor: 2; blocks.0.mixer.x_proj.weight and 23 more: 1 units do not divide over 2 ranks; fitting: 1",
    ),
    "heads": (
        ["parallel.tensor=2", "model.mixers.local_attention.heads=3"],
        "blocks.1.mixer.q_proj.weight and 1 more: 3 units do not divide over 2 ranks; fitting: 1, 3",
    ),
    "key heads": (
        [
            "parallel.tensor=2",
            "model.layers=[local_attention]",
            "model.mixers.local_attention.heads=6",
            "model.mixers.local_attention.kv_heads=3",
        ],
        "blocks.0.mixer.k_proj.weight and 1 more: 3 units do not divide over 2 ranks; fitting: 1, 3",
    ),
    "hidden units": (
        ["parallel.tensor=2", "model.mlp.width=63"],
        "blocks.0.mlp.gate.weight and 14 more: 63 units do not divide over 2 ranks; fitting: 1, 3, 7, 9, 21, 63",
    ),
    "a map that is missing": (
        [
            "parallel.tensor=2",
            "model.layers=[paralstm]",
            "model.mixers={paralstm: {width: 32, input_projection: false}}",
        ],
        "ParaLSTM: input_projection is false, so that no map hands each rank its channels; set it to true",
    ),
    "sequence length": (
        ["parallel.sequence=2", "data.sequence_length=49"],
        "parallel.sequence: 2; data.sequence_length: 49; must be a multiple of it: choose e.g. 48",
    ),
    "tokens of sharded norms": (
        ["parallel.tensor=2", "parallel.sequence_sharded_norms=true", "data.sequence_length=49"],
        "data.sequence_length: 49; must be a multiple of parallel.sequence x parallel.tensor, 2: choose e.g. 48",
    ),
    "convolution": (
        ["parallel.sequence=2", "data.sequence_length=48", "model.mixers.rglru.conv_width=26"],
        "slices of 24 tokens, where a convolution looks back 25; use fewer ranks or a longer data.sequence_length",
    ),
    "attention heads": (
        [
            "parallel.sequence=2",
            "model.layers=[attention]",
            "model.mixers={attention: {heads: 3, kv_heads: 1, head_dim: 16}}",
        ],
        "full attention has 3 heads on 1 key and value heads a rank; choose among 1, 3",
    ),
}


def messages(grid: Grid, directory: Path) -> dict[str, tuple[int, str]]:
    """What train.py returns and says on these ranks."""
    import train
    import training.start

    found = {}
    for name, (overrides, _) in CASES.items():
        said = io.StringIO()
        with (
            mock.patch.object(train, "init_distributed", return_value=grid),
            mock.patch.object(training.start, "check_run", return_value=None),  # of the corpus, which there is none of
            mock.patch.object(train, "StopRequest"),
            mock.patch.object(train, "Watch"),
            contextlib.redirect_stderr(said),
        ):
            code = train.main([str(ASSETS / "tiny.yaml"), f"log.directory={directory}", "eval.prompts=[]", *overrides])
        found[name] = code, said.getvalue()
    return found


def test_each_is_one_error_before_anything_is_built(ranks: Any, tmp_path: Path) -> None:
    lead, other = ranks(2).run(messages, directory=tmp_path)
    for name, (_, message) in CASES.items():
        code, said = lead[name]
        assert code == 1, name
        assert said.startswith("train.py: "), name
        assert message in said, name
        assert len(said.splitlines()) == 1, name
        assert other[name] == (1, ""), "the lead speaks for all"
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.refused.json"], "the reason, for whoever started it"


VOCABULARIES = [61, 3, 400]


def held(grid: Grid, sizes: list[int]) -> list[tuple[int, int]]:
    """Rows of the vocabulary on this rank, and those of them that are entries."""
    from parallel.partition import build_model
    from tests.parallel.mixed import config_of

    on = grid.arranged(tensor=grid.world_size)
    found = []
    for size in sizes:
        config = config_of(("rglru",), changes={"model": {"vocab_size": size}})
        model: Any = build_model(config, on, seed=0, sequence_length=24)[0]
        assert not model.head.weight[model.head.num_entries :].any()
        found.append((len(model.head.weight), model.head.num_entries))
    return found


def test_any_vocabulary_fits_any_number_of_ranks(ranks: Any) -> None:
    of_ranks = ranks(4).run(held, sizes=VOCABULARIES)
    for found in zip(VOCABULARIES, *of_ranks, strict=True):
        vocab_size, *shares = found
        assert {rows for rows, _ in shares} == {-(-vocab_size // 4)}
        assert sum(entries for _, entries in shares) == vocab_size
