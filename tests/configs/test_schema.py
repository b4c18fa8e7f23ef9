"""Reading a run: what is accepted, what is refused and in which words."""

from pathlib import Path

import pytest

from configs.schema import ConfigError, config_as_dict, dump_config, load_config, parse_config

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def test_every_run_in_configs_is_valid() -> None:
    paths = sorted(DEMO.parent.glob("*.yaml"))
    assert DEMO in paths
    for path in paths:
        assert load_config(path).name == path.stem


def test_layers_are_expanded_and_numbers_are_yaml_1_2() -> None:
    run = load_config(DEMO, ["optimizer.lr=3e-4", "model.layers={pattern: [rglru, local_attention], repeat: 3}"])
    assert run.optimizer.lr == 3e-4
    assert run.model.layers == ("rglru", "local_attention") * 3
    assert load_config(DEMO, ["model.layers=[rglru]"]).model.layers == ("rglru",)


def test_an_entry_of_a_list_is_overridden_by_its_index() -> None:
    run = load_config(DEMO, ["data.corpora.0.path=elsewhere", "data.corpora.0.weight=2.0", "eval.prompts.1=x"])
    assert (run.data.corpora[0].path, run.data.corpora[0].weight) == ("elsewhere", 2.0)
    assert run.eval.prompts == ("def ", "x", "import ")


def test_written_run_reads_back_equal(tmp_path: Path) -> None:
    run = load_config(DEMO, ["name=other", "log.wandb={project: p, mode: offline}"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(run), encoding="utf-8")
    assert load_config(path) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=3", r"model\.widht: 3; there is no such key; did you mean width\?"),
        ("model.mixers.rgrlu={}", r"model\.mixers\.rgrlu: .*did you mean rglru\?"),
        ("model.mixers.rglru.heads=4", r"model\.mixers\.rglru\.heads: 4; there is no such key; known here: width"),
        ("optimizer.lr='1e-3'", r'optimizer\.lr: "1e-3"; must be a valid number; correct it'),
        ("train.steps=10.5", r"train\.steps: 10\.5; must be a valid integer"),
        ("train.steps=2024-01-01", r'train\.steps: "2024-01-01"; must be a valid integer'),
        ("train.precision=fp16", r"train\.precision: \"fp16\"; must be 'fp32' or 'bf16'"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas\.1: missing; it has no default"),
        ("optimizer.betas=[0.9, 1.5]", r"optimizer\.betas: \[0\.9, 1\.5\]; each must lie in 0 to 1"),
        (
            "model.mixers.rglru.gate_blocks=5",
            r"model\.mixers\.rglru\.width: 128; must be a positive multiple of gate_blocks",
        ),
        ("model.layers=[rglru, mamba]", r"model\.layers: 'mamba' is no mixer; choose from attention"),
        ("model.layers={pattern: [rglru]}", r"model\.layers: .*\{pattern: \[mixer, \.\.\.\], repeat: number\}"),
        ("train.batch_size=6", r"train\.batch_size: 6; must be a multiple of micro_batch_size \(4\)"),
        (
            "optimizer.schedule.warmup_steps=5000",
            r"optimizer\.schedule: 5000 warm-up and 0 decay steps exceed train\.steps",
        ),
        ("optimizer.schedule={kind: wsd}", r"optimizer\.schedule\.decay_steps: None; kind wsd needs it"),
        ("parallel.zero_stage=7", r"parallel\.zero_stage: 7; must be 0"),
        ("eval.every=null", r"eval\.prompts: given, but eval\.every is null"),
        ("name=a/b", r"name: 'a/b'; must be a single directory name"),
        ("model.mixers.local_attention.head_dim=0", r"model\.mixers\.local_attention\.head_dim: 0; must be positive"),
        ("name=..", r"name: '\.\.'; must be a single directory name"),
        ("log.directory=''", r"log\.directory: ''; must name a directory"),
        ("optimizer.lr=.nan", r"optimizer\.lr: NaN; must be a finite number"),
        ("train.z_loss=.inf", r"train\.z_loss: Infinity; must be a finite number"),
        ("train", "train: an override has the form key.sub=value"),
        ("name.sub=1", r"name\.sub=1: name is no mapping; override it as a whole"),
        (
            "data.corpora.1.path=x",
            r"data\.corpora\.1\.path=x: corpora is a list of 1; name one of its entries by index",
        ),
        ("train.steps=[1", r"train\.steps=\[1: line 1:"),
        ("data.corpora=[]", r"^data\.corpora: value \(\); must hold at least one"),
        ("data.sequence_length=0", r"^data\.sequence_length: value 0; must be at least 1"),
    ],
)
def test_refusals_name_key_value_and_way_out(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, [override])


def test_errors_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, ["train.steps=x", "model.widht=3", "optimizer.lr=-1"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "model.widht",
        "train.steps",
        "optimizer.lr",
    ]


def test_missing_rooms_and_duplicate_keys(tmp_path: Path) -> None:
    values = config_as_dict(load_config(DEMO))
    del values["optimizer"]["lr"], values["data"]
    with pytest.raises(ConfigError, match=r"data: missing; it has no default.*\noptimizer\.lr: missing"):
        parse_config(values)
    twice = tmp_path / "twice.yaml"
    twice.write_text("name: a\nname: b\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"twice\.yaml: line 2: found duplicate key"):
        load_config(twice)
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ConfigError, match="a run is a mapping"):
        load_config(tmp_path / "list.yaml")
