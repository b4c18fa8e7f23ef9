"""There and back: instances of published classes become checkpoints, train on, and are the same class again."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import load_config
from models.checkpoint import read_weights, verify
from models.hf.__main__ import main
from models.hf.importing import load_directory, open_directory
from models.hf.registry import choose
from models.hf.weights import INDEX
from models.lm import LM
from models.restore import restore_model
from tests.models.hf_instances import CLASSES, config_of, save_instance, tensors_of

ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import sys, train
for config in sys.argv[1:]:
    assert train.main([config]) == 0, config
"""

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


def test_olmo_hybrid_is_read_in_the_three_ways_its_weights_are_laid_out(
    instances: dict[str, Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    """As published, as its class saves them, and as it calls them in memory."""
    from safetensors.torch import save_file

    from models.hf.olmo_hybrid import OWN_NAMES

    published, saved = open_directory(exported["olmo_hybrid"]), open_directory(instances["olmo_hybrid"])
    own = OWN_NAMES.tensors(saved.config, saved.shapes)
    save_file({tensor.name: tensor.cut(saved.read(tensor.source)) for tensor in own}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((instances["olmo_hybrid"] / "config.json").read_bytes())
    in_memory = open_directory(tmp_path)
    assert [len(found.tensors) for found in (published, saved, in_memory)] == [68, 68, 62]
    names = [{tensor.name for tensor in found.tensors} for found in (published, saved, in_memory)]
    assert "model.layers.3.post_attention_layernorm.weight" in names[0] - names[1]
    assert "model.layers.0.linear_attn.conv1d.weight" in names[2] - names[0]
    for parameter in saved.shapes:
        assert torch.equal(published.read(parameter), saved.read(parameter)), parameter
        assert torch.equal(in_memory.read(parameter), saved.read(parameter)), parameter


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


def test_training_goes_on_and_the_result_is_exported(imported: dict[str, Path], tmp_path: Path) -> None:
    """Five steps of each through train.py, from the imported weights, then the classes again."""
    configs = []
    for name, path in imported.items():
        model = path.with_name(f"{name}.yaml").read_text().split("\ndata:")[0].partition("model:")[2]
        text = f"name: {name}\nmodel:{model}" + RUN.format(resume=path, runs=tmp_path / "runs")
        configs.append(tmp_path / f"{name}.yaml")
        configs[-1].write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *map(str, configs)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, path in imported.items():
        run = tmp_path / "runs" / name
        assert main(["export", str(run), str(tmp_path / name), "--no-tokenizer"]) == 0
        before, after = read_weights(path), read_weights(run / "checkpoints" / "step_00000005")
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == before.keys()
        largest = max((after[key] - before[key]).abs().max().item() for key in before)
        assert largest < 6e-3, "five steps of 1e-3 from where it was, not from somewhere else"
        assert "| Training steps | 5 |" in (tmp_path / name / "README.md").read_text()
        assert torch.equal(open_directory(tmp_path / name).read("embed.weight"), after["embed.weight"])


@pytest.mark.parametrize("name", ["olmo_hybrid", "fla_hgrn2", "fla_gated_deltanet"])
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
