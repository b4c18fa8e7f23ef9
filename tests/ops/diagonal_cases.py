"""Calls and inputs of the Triton kernels of diagonal_lstm and diagonal_gru, that several files test."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import diagonal_gru, diagonal_lstm
from ops.diagonal_cell import triton as host
from ops.diagonal_gru.cell import GRU
from ops.diagonal_gru.triton import form as gru_form
from ops.diagonal_lstm.cell import LSTM
from ops.diagonal_lstm.triton import form as lstm_form
from tests.ops.compare import DEVICE, SLOW, Inputs

OPS = {
    "lstm": partial(diagonal_lstm, output_final_state=True),
    "gru": partial(diagonal_gru, output_final_state=True),
}
FORMS = {"lstm": lstm_form, "gru": gru_form}
CELLS = {"lstm": LSTM, "gru": GRU}
both = pytest.mark.parametrize("name", OPS)
one_at_first = pytest.mark.parametrize("name", ["gru", pytest.param("lstm", marks=SLOW)])


def make_inputs(
    name: str, time: int, *, batch: int = 2, width: int = 5, spread: float = 0.5, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Recurrent and peephole weights from N(0, spread^2)."""
    inputs = {
        "gates": torch.randn(batch, time, 3, width, dtype=dtype),
        "a": spread * torch.randn(3, width, dtype=dtype),
        "c": spread * torch.randn(2, width, dtype=dtype),
        "initial_state": torch.randn(batch, CELLS[name].num_states, width, dtype=dtype),
    }
    if name == "gru":
        del inputs["c"]
    return inputs


def on_device(inputs: Inputs) -> Inputs:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def in_segments(name: str, *, impl: str, segments: int, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The op, of which the reference knows no segments."""
    return OPS[name](impl=impl, segments=segments if impl == "triton" else None, **arguments)


def accumulation() -> torch.dtype:
    """float64 where kernels are interpreted; compiled ones have fp32."""
    return torch.float64 if DEVICE == "cpu" else torch.float32


def length_of_a_segment() -> int:
    return max(host.AHEAD_FORWARD, host.AHEAD_BACKWARD)
