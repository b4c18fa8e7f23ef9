import pytest

from parallel.config import DEEPSPEED_KEYS, DEFAULTS, DERIVED_KEYS, OFFLOADS, ParallelConfig, deepspeed_config
from parallel.grid import Grid


def nested(path: str, value: object) -> dict:
    *outer, last = path.split(".")
    mapping = {last: value}
    for key in reversed(outer):
        mapping = {key: mapping}
    return mapping


@pytest.mark.parametrize("path", [*DERIVED_KEYS, *OFFLOADS])
def test_engine_may_not_contradict_the_run(path):
    with pytest.raises(ValueError, match=rf"^engine\.{path}: 7; .*remove it"):
        ParallelConfig(engine=nested(path, 7))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("zero_stage", 4, "zero_stage: 4; must be 0, 1, 2 or 3"),
        ("sequence_sharded_norms", True, "sequence_sharded_norms: true; needs tensor ranks, and tensor is 1"),
        ("timeout_minutes", 0, "timeout_minutes: 0; must be positive"),
        ("pipeline", 0, "pipeline: 0; must be at least 1"),
        (
            "stages",
            (2, 2),
            r"stages: \[2, 2\]; must be 1 numbers of blocks \(pipeline: 1\), each at least 1; correct it",
        ),
        ("engine", {"zero_optimization": 2}, "engine.zero_optimization: 2; must be a mapping"),
    ],
)
def test_bad_values_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**{key: value})


PIPELINE = [
    ({"zero_stage": 2}, "zero_stage: 2; must be 0 or 1 with pipeline: 2, .* set zero_stage: 1, or pipeline: 1"),
    ({"zero_stage": 3}, "zero_stage: 3; must be 0 or 1 with pipeline: 2"),
    ({"stages": (3,)}, r"stages: \[3\]; must be 2 numbers of blocks"),
    ({"stages": (3, 0)}, r"stages: \[3, 0\]; must be 2 numbers of blocks \(pipeline: 2\), each at least 1"),
    ({"engine": nested("zero_optimization.overlap_comm", True)}, "overlap_comm: True; DeepSpeed does not overlap with"),
]


@pytest.mark.parametrize(("settings", "message"), PIPELINE)
def test_what_stages_cannot_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(pipeline=2, **settings)


@pytest.mark.parametrize(("path", "stage"), OFFLOADS.items())
def test_offloading_needs_a_stage_that_can(path, stage):
    kept = nested(path, {"device": "cpu"})
    ParallelConfig(zero_stage=stage, engine=kept)
    with pytest.raises(ValueError, match=rf"^engine\.{path}: .*needs zero_stage {stage} or higher, .*is {stage - 1};"):
        ParallelConfig(zero_stage=stage - 1, engine=kept)
    with pytest.raises(ValueError, match=rf"^engine\.{path}: .*its device must be cpu"):
        ParallelConfig(zero_stage=stage, engine=nested(path, {"device": "nvme"}))
    with pytest.raises(ValueError, match=rf"^engine\.{path}\.ratio: 0\.5; must be 1\.0"):
        ParallelConfig(zero_stage=stage, engine=nested(path, {"device": "cpu", "ratio": 0.5}))


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
