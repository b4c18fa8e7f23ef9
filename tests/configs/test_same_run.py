"""What may be continued, and what is another run."""

from pathlib import Path

import pytest

from configs.same_run import refuse_other_model, refuse_other_run
from configs.schema import ConfigError, RunConfig, config_as_dict, dump_config, load_config

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "any.model"
    path.write_bytes(b"pieces")
    return path


def demo(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(DEMO, [f"log.directory={tmp_path / 'runs'}", *overrides])


def write_run(run: RunConfig, tokenizer: Path) -> None:
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(dump_config(run), encoding="utf-8")
    (run.directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())


def test_absent_and_empty_directories_are_free(tmp_path: Path, tokenizer: Path) -> None:
    run = demo(tmp_path)
    refuse_other_run(run, tokenizer)
    run.directory.mkdir(parents=True)
    refuse_other_run(run, tokenizer)
    (run.directory / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds files but no config"):
        refuse_other_run(run, tokenizer)


def test_the_same_run_goes_on_longer_or_slower(tmp_path: Path, tokenizer: Path) -> None:
    write_run(demo(tmp_path), tokenizer)
    refuse_other_run(demo(tmp_path, "train.steps=900", "optimizer.lr=1e-3", "data.prefetch=0"), tokenizer)
    refuse_other_run(demo(tmp_path, "model.impl={linear_scan: reference}", "parallel.zero_stage=2"), tokenizer)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mlp.width=100", r"model\.mlp\.width: 100, but .*demo holds a run with 384; set the value back"),
        ("data.seed=3", r"data\.seed: 3, but .* with 0"),
        ("train.seed=1", r"train\.seed: 1, but .* with 0"),
    ],
)
def test_another_model_or_other_data_are_refused(tmp_path: Path, tokenizer: Path, override: str, message: str) -> None:
    write_run(demo(tmp_path), tokenizer)
    with pytest.raises(ConfigError, match=message):
        refuse_other_run(demo(tmp_path, override), tokenizer)


def test_another_tokenizer_under_the_same_path_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    write_run(demo(tmp_path), tokenizer)
    tokenizer.write_bytes(b"other pieces")
    with pytest.raises(ConfigError, match=r"was made with another; prepare the corpus with .*tokenizer\.model"):
        refuse_other_run(demo(tmp_path), tokenizer)
    with pytest.raises(ConfigError, match="its tokenizer is None"):
        refuse_other_run(demo(tmp_path), None)


def test_a_checkpoint_of_a_model_of_equal_shapes_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    """A window leaves no trace in the shapes."""
    run = demo(tmp_path)
    held = config_as_dict(demo(tmp_path, "model.mixers.local_attention.window=32"))["model"]
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    refuse_other_model(run, tmp_path, config_as_dict(run)["model"], tokenizer)
    with pytest.raises(ConfigError, match=r"model\.mixers\.local_attention\.window: 64, but .* holds a model with 32"):
        refuse_other_model(run, tmp_path, held, tokenizer)
