"""The complete runs in configs/: sizes as their names promise, shapes that shard, and a real step of each, narrowed."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import RunConfig, load_config
from models.config import ModelConfig
from models.hf.recurrentgemma import differences
from models.lm import LM

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = ("recurrentgemma_", "olmo_hybrid_")
"""Others' models, in their sizes (tests/models/test_hf_published.py)."""

PRESETS = sorted(
    path
    for path in CONFIGS.glob("*.yaml")
    if re.search(r"_\d+(p\d+)?[bm]$", path.stem) and not path.stem.startswith(PUBLISHED)
)
NARROWED = 16
WIDTHS = ("width", "head_dim")


def promised_params(run: RunConfig) -> float:
    size = run.name.rsplit("_", 1)[1]
    return float(size[:-1].replace("p", ".")) * {"m": 1e6, "b": 1e9}[size[-1]]


def narrow(settings: Any) -> Any:
    """The same ratios at 1/16 of every width; head and block counts stay."""
    if not dataclasses.is_dataclass(settings):
        return settings
    changes = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in WIDTHS:
            assert value % NARROWED == 0, f"{field.name}: {value}"
            changes[field.name] = value // NARROWED
        elif dataclasses.is_dataclass(value):
            changes[field.name] = narrow(value)
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_size_is_what_the_name_says(path: Path) -> None:
    run = load_config(path)
    with torch.device("meta"):
        model = LM(run.model)
    assert model.num_params() == run.model.num_params()
    assert model.num_params() == pytest.approx(promised_params(run), rel=0.02)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_heads_and_blocks_divide_by_eight(path: Path) -> None:
    run = load_config(path)
    for kind in set(run.model.layers):
        for field in dataclasses.fields(run.model.mixer(kind)):
            if field.name in ("heads", "gate_blocks", "value_heads"):
                heads = getattr(run.model.mixer(kind), field.name)  # None: as many as another field says
                assert heads is None or heads % 8 == 0, f"{kind}.{field.name}"
    assert run.model.width % 128 == run.model.vocab_size % 128 == 0


@pytest.mark.parametrize("path", [path for path in PRESETS if "griffin" in path.stem], ids=lambda path: path.stem)
def test_griffin_exports_to_transformers_own_class(path: Path) -> None:
    assert differences(load_config(path).model) == []


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_narrowed_model_takes_a_training_step(path: Path) -> None:
    config: ModelConfig = narrow(dataclasses.replace(load_config(path).model, vocab_size=128))
    model = LM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 128, (1, 65), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(2):
        nll, _ = model(ids[:, :-1], torch.arange(64)[None], ids[:, 1:])
        nll.mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nll.mean().item())
    assert losses[1] < losses[0]
