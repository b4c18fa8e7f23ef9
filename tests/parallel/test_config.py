import pytest

from parallel.config import DEEPSPEED_KEYS, DEFAULTS, DERIVED_KEYS, UNSUPPORTED_KEYS, ParallelConfig, deepspeed_config
from parallel.grid import Grid


def nested(path: str, value: object) -> dict:
    *outer, last = path.split(".")
    mapping = {last: value}
    for key in reversed(outer):
        mapping = {key: mapping}
    return mapping


@pytest.mark.parametrize("path", [*DERIVED_KEYS, *UNSUPPORTED_KEYS])
def test_engine_may_not_contradict_the_run(path):
    with pytest.raises(ValueError, match=rf"^engine\.{path}: 7; .*remove it"):
        ParallelConfig(engine=nested(path, 7))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("zero_stage", 3, "zero_stage: 3; must be 0, 1 or 2"),
        ("timeout_minutes", 0, "timeout_minutes: 0; must be positive"),
        ("engine", {"zero_optimization": 2}, "engine.zero_optimization: 2; must be a mapping"),
    ],
)
def test_bad_values_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "nearest"), [("zero_optimisation", "zero_optimization"), ("pipelines", "pipeline"), ("TIMERS", "timers")]
)
def test_a_key_that_deepspeed_would_pass_over_is_refused_with_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=rf"^engine\.{key}: 7; .* the nearest is {nearest}; correct or remove it"):
        ParallelConfig(engine={key: 7})


def keys_that_deepspeed_reads(grid: Grid) -> set[object]:
    """The installed DeepSpeed reads a configuration that notes what it is asked for."""
    from deepspeed.runtime import config

    asked: set[object] = set()

    class Noted(dict):
        def __contains__(self, key: object) -> bool:
            asked.add(key)
            return super().__contains__(key)

        def __getitem__(self, key: str) -> object:
            asked.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: object = None) -> object:
            asked.add(key)
            return super().get(key, default)

        def keys(self):
            return self

    config.DeepSpeedConfig(Noted(derive(ParallelConfig())))
    return asked - set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)


def test_the_known_keys_are_those_of_the_installed_deepspeed(ranks):
    asked = ranks(2).run(keys_that_deepspeed_reads)[0]
    assert asked - {"sequence_parallel_size"} == DEEPSPEED_KEYS, "it shapes the process grid, which is not DeepSpeed's"


def derive(parallel: ParallelConfig, precision: str = "fp32", clip_norm: float | None = 0.5) -> dict:
    return deepspeed_config(parallel, clip_norm=clip_norm, precision=precision, micro_batch_size=2, num_microbatches=3)


def test_engine_keys_are_added_to_the_derived_ones():
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    config = derive(ParallelConfig(zero_stage=2, engine=extra))
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert derive(ParallelConfig())["zero_optimization"] == {"stage": 1} | DEFAULTS["zero_optimization"]
    assert config["wall_clock_breakdown"] is True
    assert config["gradient_clipping"] == 0.5
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 3)


def test_no_clipping_is_zero_for_deepspeed():
    assert derive(ParallelConfig(), clip_norm=None)["gradient_clipping"] == 0.0


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision: 'fp16'; must be fp32 or bf16"):
        derive(ParallelConfig(), precision="fp16")
