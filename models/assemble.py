"""A model from its parameters, one at a time: beside the model never more than one of them is in memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.lm import LM


def assemble(config: ModelConfig, read: Callable[[str], Tensor], *, device_type: str = "cpu") -> LM:
    """An `LM` on the CPU whose parameters are what `read` returns for their names, fp32, each asked for once.

    Raises:
        ValueError: a tensor has another shape than the parameter.
    """
    with torch.device("meta"):
        model = LM(config, device_type=device_type)
    filled: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays one
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter not in filled:
                tensor = read(names[parameter])
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{names[parameter]}: {list(tensor.shape)}; the model's has the shape {list(parameter.shape)}"
                    )
                filled[parameter] = nn.Parameter(tensor.to(torch.float32))
            setattr(module, leaf, filled[parameter])
    return model
