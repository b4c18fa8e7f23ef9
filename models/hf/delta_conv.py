"""Gated DeltaNet's convolution over [q | k | v], which some classes store as three."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from models.config import ModelConfig
from models.hf.formats import Layout, Shapes, Stored
from models.mixers.gated_deltanet import GatedDeltaNetConfig

LETTERS = "qkv"

Sizes = Callable[[GatedDeltaNetConfig], Sequence[int]]
"""Channels of the three parts."""


def by_projection(mixer: GatedDeltaNetConfig) -> Sequence[int]:
    """Those of queries, keys and values."""
    keys = mixer.heads * mixer.head_dim
    return keys, keys, mixer.num_value_heads * mixer.value_dim


def in_thirds(mixer: GatedDeltaNetConfig) -> Sequence[int]:
    """As equal as transformers' save_pretrained cuts them, whatever they are parts of."""
    total = sum(by_projection(mixer))
    third = -(-total // 3)
    return third, third, total - 2 * third


def split_convolution(layout: Layout, sizes: Sizes = by_projection) -> Layout:
    """`layout` with each convolution, a name that holds `{}`, as three tensors: q, k, v in its place."""

    def split(config: ModelConfig, shapes: Shapes) -> list[Stored]:
        parts = sizes(config.mixer("gated_deltanet"))
        found = []
        for stored in layout(config, shapes):
            if "{}" not in stored.name:
                found.append(stored)
                continue
            start = 0
            for letter, size in zip(LETTERS, parts, strict=True):
                name, shape = stored.name.format(letter), (size, *stored.shape[1:])
                found.append(replace(stored, name=name, shape=shape, rows=(start, start + size)))
                start += size
        return found

    return split
