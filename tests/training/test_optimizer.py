"""Weight decay reaches matrices and spares what the no-decay list names."""

import pytest
import torch
from torch import nn

from configs.schema import load_config
from models.lm import LM
from training.optimizer import parameter_groups


def test_every_parameter_is_in_one_group() -> None:
    model = LM(load_config("configs/demo.yaml").model)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ([names.pop(id(p)) for p in group["params"]] for group in parameter_groups(model, 0.3))
    assert not names
    assert "embed.weight" in decayed
    assert "blocks.0.mixer.input_gate.weight" in decayed
    assert "blocks.0.mixer.conv.weight" in decayed
    assert {"blocks.0.mixer.decay_param", "head.norm.weight", "blocks.0.mixer.input_gate.bias"} <= set(spared)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.3)] == [0.3, 0.0]


def test_an_unlisted_vector_is_refused() -> None:
    module = nn.Module()
    module.residual_scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"residual_scale: a vector that no pattern of training\.optimizer\.NO_DECAY"):
        parameter_groups(module, 0.1)
