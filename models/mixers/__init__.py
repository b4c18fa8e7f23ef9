"""The registry of mixers: the name a run's `model.layers` uses, and the class.

The contract every mixer keeps, attention included (`tests/models/test_mixers.py` holds all of them to it):

    Mixer(config, width, *, output_scale, impl)    config: its own `config_class`; width: D of the model;
                                                   impl: op name -> implementation, `auto` where absent
    forward(x [B, T, D], layout, state=None) -> (y [B, T, D], state)
    init_state(batch_size, device) -> state        passing a state asks for the next one; None returns None
    initializers() -> {parameter: rule}            for the parameters the module itself owns (`models/init.py`)
    flops_per_token(sequence_length) -> int        forward, two per multiply-add
    config.num_params(width) -> int

The op is called through the parameter-free submodule `core`, which `parallel/` may wrap from outside.
"""

from dataclasses import field, make_dataclass
from typing import Any

from models.mixers.attention import Attention, LocalAttention
from models.mixers.rglru import RGLRU

MIXERS: dict[str, Any] = {
    "attention": Attention,
    "local_attention": LocalAttention,
    "rglru": RGLRU,
}

MixerConfigs: Any = make_dataclass(
    "MixerConfigs",
    [(name, mixer.config_class | None, field(default=None)) for name, mixer in MIXERS.items()],
    frozen=True,
    kw_only=True,
)
"""One optional entry a registered mixer, each of that mixer's own config class."""
