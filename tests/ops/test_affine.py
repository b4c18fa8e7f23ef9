"""Affine maps of a state: composition is application one after the other, for every kind of transition."""

import pytest
import torch
from torch import Tensor

from ops import Affine

STATES = {"channels": (2, 5), "keys": (2, 3, 4, 6), "heads": (2, 3, 4, 6), "cells": (2, 2, 5)}
TRANSITIONS = {"channels": (2, 5), "keys": (2, 3, 4), "heads": (2, 3, 4, 4), "cells": (2, 2, 2, 5)}


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def by_hand(kind: str, transition: Tensor, state: Tensor) -> Tensor:
    """Channel by channel, head by head."""
    out = torch.empty_like(state)
    for b in range(len(state)):
        if kind == "channels":
            out[b] = torch.diag(transition[b]) @ state[b]
        elif kind == "cells":
            for d in range(state.shape[-1]):
                out[b, :, d] = transition[b, :, :, d] @ state[b, :, d]
        else:
            for h in range(state.shape[1]):
                matrix = torch.diag(transition[b, h]) if kind == "keys" else transition[b, h]
                out[b, h] = matrix @ state[b, h]
    return out


@pytest.mark.parametrize("kind", STATES)
def test_acts_and_composes(kind: str) -> None:
    torch.manual_seed(0)
    slices = [Affine(random(TRANSITIONS[kind]), random(STATES[kind])) for _ in range(3)]
    state = random(STATES[kind])
    expected = state
    for part in slices:
        expected = by_hand(kind, part.transition, expected) + part.offset
    torch.testing.assert_close(slices[2](slices[1](slices[0](state))), expected)
    torch.testing.assert_close(slices[0].then(slices[1]).then(slices[2])(state), expected)
    torch.testing.assert_close(slices[0].then(slices[1].then(slices[2]))(state), expected)


@pytest.mark.parametrize("kind", STATES)
def test_autocast_leaves_states_alone(kind: str) -> None:
    torch.manual_seed(0)
    first, second = (Affine(random(TRANSITIONS[kind]).float(), random(STATES[kind]).float()) for _ in range(2))
    expected = first.then(second)(first.offset)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first.then(second)(first.offset), expected)
