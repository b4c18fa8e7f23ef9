"""There and back: instances of published classes become checkpoints, train on, and are the same class again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.schema import load_config
from models.checkpoint import read_weights, verify
from models.hf.__main__ import main
from models.hf.importing import load_directory, open_directory
from models.hf.olmo_hybrid import OLMO_HYBRID, OWN_NAMES
from models.hf.registry import choose
from models.hf.weights import INDEX
from models.lm import LM
from models.restore import restore_model
from tests.forked_train import ForkedTrain
from tests.models.hf_instances import CLASSES, config_of, save_instance, tensors_of

RUN = """
data: {{source: "synthetic:recall", options: {{pairs: 4}}, sequence_length: 32}}
train: {{steps: 5, batch_size: 4, micro_batch_size: 4, precision: fp32}}
optimizer: {{lr: 1e-3, clip_norm: 1.0, schedule: {{warmup_steps: 2}}}}
checkpoint: {{every: 5, keep_last: 1, resume: {resume}}}
log: {{directory: {runs}, every: 1}}
"""


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("published")
    return {name: save_instance(name, directory / name) for name in CLASSES}


@pytest.fixture(scope="module")
def imported(instances: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints; the command compares each with its class."""
    directory = tmp_path_factory.mktemp("imported")
    for name, path in instances.items():
        assert main(["import", str(path), str(directory / name)]) == 0
    return {name: directory / name for name in instances}


@pytest.fixture(scope="module")
def exported(imported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("exported")
    for name, path in imported.items():
        assert main(["export", str(path), str(directory / name), "--no-tokenizer"]) == 0
    return {name: directory / name for name in imported}


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_comes_back_bit_for_bit(
    name: str, instances: dict[str, Path], imported: dict[str, Path], exported: dict[str, Path]
) -> None:
    original, checkpoint, again = (open_directory(paths[name]) for paths in (instances, exported, exported))
    weights = read_weights(imported[name])
    assert weights.keys() == original.shapes.keys()
    for parameter, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, original.read(parameter)), parameter
        assert torch.equal(weight, again.read(parameter)), parameter
    assert original.config == checkpoint.config
    if name != "olmo_hybrid":  # whose class saves under other names than the published weights have
        before, after = tensors_of(instances[name]), tensors_of(exported[name])
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", CLASSES)
def test_configurations_mean_the_same(name: str, instances: dict[str, Path], exported: dict[str, Path]) -> None:
    ours, theirs = config_of(exported[name]), config_of(instances[name])
    for key in ("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers"):
        assert ours[key] == theirs[key], key
    assert choose(open_directory(instances[name]).config).architecture == theirs["architectures"][0]


def test_olmo_hybrid_is_read_in_the_four_ways_its_weights_are_laid_out(
    instances: dict[str, Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    """As published, as published with other names of norms, as its class saves them, and as it calls them in memory."""
    published, saved = open_directory(exported["olmo_hybrid"]), open_directory(instances["olmo_hybrid"])
    layouts = {"earlier": OLMO_HYBRID.layouts[0], "in_memory": OWN_NAMES.tensors}
    found = {"published": published, "saved": saved}
    for name, layout in layouts.items():
        (tmp_path / name).mkdir()
        tensors = {tensor.name: tensor.cut(saved.read(tensor.source)) for tensor in layout(saved.config, saved.shapes)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_bytes((instances["olmo_hybrid"] / "config.json").read_bytes())
        found[name] = open_directory(tmp_path / name)
    counts = {"published": 68, "saved": 68, "earlier": 68, "in_memory": 62}
    assert {name: len(directory.tensors) for name, directory in found.items()} == counts
    names = {name: {tensor.name for tensor in directory.tensors} for name, directory in found.items()}
    assert "model.layers.0.linear_attn.q_conv1d.weight" in names["published"] - names["in_memory"]
    assert "model.layers.0.input_layernorm.weight" in (names["published"] & names["in_memory"]) - names["earlier"]
    assert "model.layers.3.post_attention_layernorm.weight" in names["published"] - names["saved"]
    for directory in found.values():
        for parameter in saved.shapes:
            assert torch.equal(directory.read(parameter), saved.read(parameter)), parameter


@pytest.mark.slow
def test_olmo_hybrid_s_attention_may_rotate(instances: dict[str, Path], tmp_path: Path) -> None:
    """The published model's does not. Both ways compare with the class."""
    shutil.copytree(instances["olmo_hybrid"], tmp_path / "rotating")
    rotation = {"rope_type": "default", "rope_theta": 5e5}
    settings = config_of(tmp_path / "rotating")
    assert settings["rope_parameters"]["rope_theta"] is None
    (tmp_path / "rotating" / "config.json").write_text(json.dumps(settings | {"rope_parameters": rotation}))
    assert main(["import", str(tmp_path / "rotating"), str(tmp_path / "checkpoint")]) == 0
    assert restore_model(tmp_path / "checkpoint").config.mixer("attention").rotary_theta == 5e5
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--no-tokenizer"]) == 0
    assert config_of(tmp_path / "out")["rope_parameters"] == rotation


def test_a_parameter_that_the_class_never_read_is_left_out(
    instances: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the published Gated DeltaNet of 1.3B parameters, made before its class lost them."""
    shutil.copytree(instances["fla_gated_deltanet"], tmp_path / "published")
    weights = load_file(tmp_path / "published" / "model.safetensors")
    more = {f"model.layers.{i}.attn.D": torch.ones(2) for i in range(4)}
    save_file(weights | more, tmp_path / "published" / "model.safetensors")
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "out")]) == 0
    assert f"left out, as the class computes nothing with them: {', '.join(more)}\n" in capsys.readouterr().out
    assert read_weights(tmp_path / "out").keys() == open_directory(instances["fla_gated_deltanet"]).shapes.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_an_imported_checkpoint_is_whole_and_the_model(
    name: str, instances: dict[str, Path], imported: dict[str, Path]
) -> None:
    verify(imported[name])
    ids = torch.randint(32, (1, 20), generator=torch.Generator().manual_seed(3))
    logits = [_logits(model, ids) for model in (restore_model(imported[name]), load_directory(instances[name]))]
    assert torch.equal(*logits)
    assert [path.name for path in imported[name].parent.glob(f".{name}*")] == []


def test_the_yaml_beside_describes_the_run(imported: dict[str, Path]) -> None:
    for path in imported.values():
        run = load_config(path.with_name(f"{path.name}.yaml"))
        assert run.model == restore_model(path).config
        assert run.checkpoint.resume == str(path)


QUICK = ("recurrentgemma", "fla_gated_deltanet_tied")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CLASSES])
def test_training_goes_on_and_the_result_is_exported(name: str, imported: dict[str, Path], tmp_path: Path) -> None:
    """Five steps of train.py from the imported weights, then the class again."""
    path = imported[name]
    model = path.with_name(f"{name}.yaml").read_text().split("\ndata:")[0].partition("model:")[2]
    text = f"name: {name}\nmodel:{model}" + RUN.format(resume=path, runs=tmp_path / "runs")
    (tmp_path / "run.yaml").write_text(text)
    done = ForkedTrain([str(tmp_path / "run.yaml")], tmp_path / "said").wait(timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    run, out = tmp_path / "runs" / name, tmp_path / "out"
    assert main(["export", str(run), str(out), "--no-tokenizer"]) == 0
    before, after = read_weights(path), read_weights(run / "checkpoints" / "step_00000005")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == before.keys()
    largest = max((after[key] - before[key]).abs().max().item() for key in before)
    assert largest < 6e-3, "five steps of 1e-3 from where it was, not from somewhere else"
    assert "| Training steps | 5 |" in (out / "README.md").read_text()
    assert torch.equal(open_directory(out).read("embed.weight"), after["embed.weight"])


@pytest.mark.parametrize(
    "name",
    ["fla_hgrn2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo_hybrid", "fla_gated_deltanet"))],
)
def test_bf16_shards_keep_decays_in_fp32(name: str, imported: dict[str, Path], tmp_path: Path) -> None:
    command = ["export", str(imported[name]), str(tmp_path / "out"), "--no-tokenizer", "--dtype", "bfloat16"]
    assert main([*command, "--max-shard-size", "10KB"]) == 0
    found = open_directory(tmp_path / "out")
    assert (tmp_path / "out" / INDEX).is_file()
    assert len(set(found.weights.files.values())) > 3
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    precise = {key for key, dtype in found.weights.dtypes.items() if dtype == "F32"}
    ends = ("lower_bounds",) if name == "fla_hgrn2" else ("A_log", "dt_bias")
    assert precise == {key for key in found.weights.shapes if key.endswith(ends)}
    assert precise
    for key, weight in read_weights(imported[name]).items():
        kept = key.endswith(ends)
        assert torch.equal(found.read(key), weight if kept else weight.bfloat16().float()), key
    card = (tmp_path / "out" / "README.md").read_text()
    assert "bfloat16, decays and recurrent weights in float32" in card
    assert "Rounding the weights" in card


@pytest.mark.parametrize("fault", ["A_log", "q_conv1d", "norm_eps"])
def test_a_wrong_gated_deltanet_is_refused(
    fault: str, imported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Mutants of the export: a decay that is off, two convolutions exchanged, a setting that is not the model's."""
    from models.hf import delta_conv, export
    from models.hf.formats import Stored

    honest_cut, honest_json = Stored.cut, export.json.dumps
    if fault == "A_log":
        monkeypatch.setattr(
            Stored, "cut", lambda self, p: honest_cut(self, p) + (0.3 if self.name.endswith("0.attn.A_log") else 0)
        )
    elif fault == "q_conv1d":
        monkeypatch.setattr(delta_conv, "LETTERS", "kqv")
    else:
        monkeypatch.setattr(export.json, "dumps", lambda v, **o: honest_json({**v, "norm_eps": 1e-2}, **o))
    target = tmp_path / "out" / "model"
    assert main(["export", str(imported["fla_gated_deltanet"]), str(target), "--no-tokenizer"]) == 1
    assert "not written, because as GatedDeltaNetForCausalLM logits differ" in capsys.readouterr().err
    assert list(target.parent.iterdir()) == []


@torch.no_grad()
def _logits(model: LM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, torch.arange(ids.shape[1]).expand_as(ids))[0]
