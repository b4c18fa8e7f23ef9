"""The precision in which ops accumulate and keep their states."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32 for inputs of fp32 and below, float64 as soon as one input is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype to which a matrix product of x and weight rounds its operands: autocast's where it is on."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    device_type = x.device.type
    able = torch.amp.is_autocast_available(device_type)  # the meta device knows no autocast
    if able and torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside it matrix products on x's device keep their operands' dtype; the meta device knows no autocast."""
    device_type = x.device.type
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()
