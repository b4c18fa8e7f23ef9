"""A model's choice of an implementation reaches every norm and every rotation, which are no recurrence's core."""

from types import ModuleType

import pytest
import torch

from models.config import ModelConfig
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import AttentionConfig
from models.mixers.hgrn2 import HGRN2Config
from models.mlp import MLPConfig
from models.norm import RMSNorm
from ops.rms_norm import triton as norm_kernels
from ops.rotary import triton as rotary_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model(impl: dict[str, str] | None) -> LM:
    mixers = MixerConfigs(
        hgrn2=HGRN2Config(heads=2), attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8, qk_norm="head")
    )
    config = ModelConfig(
        vocab_size=11, width=16, layers=("hgrn2", "attention"), mixers=mixers, mlp=MLPConfig(width=16), impl=impl
    )
    return LM(config, device_type=DEVICE).to(DEVICE)


@pytest.mark.parametrize(("op", "kernels", "count"), [("rms_norm", norm_kernels, 8), ("rotary", rotary_kernels, 2)])
def test_the_choice_is_obeyed(monkeypatch: pytest.MonkeyPatch, op: str, kernels: ModuleType, count: int) -> None:
    calls = []
    real = getattr(kernels, op)
    monkeypatch.setattr(kernels, op, lambda *args: (calls.append(1), real(*args))[1])
    ids, positions = torch.tensor([[1, 2, 3]], device=DEVICE), torch.arange(3, device=DEVICE)[None]
    expected, _ = model(None)(ids, positions)
    assert not calls
    logits, _ = model({op: "triton"})(ids, positions)
    assert len(calls) == count
    torch.testing.assert_close(logits, expected)


def test_eight_norms_are_all() -> None:
    assert sum(isinstance(module, RMSNorm) for module in model(None).modules()) == 8


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="rms_norm has no implementation 'cudnn'; choose one of auto, chunked"):
        model({"rms_norm": "cudnn"})
