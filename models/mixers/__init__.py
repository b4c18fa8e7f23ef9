"""The registry of mixers: the name a run's `model.layers` uses, and the class.

The contract every mixer keeps, attention included (`tests/models/test_mixers.py` holds all of them to it):

    Mixer(config, placement)                       config: of its own `config_class`; placement: what it needs to
                                                   know of the model (`models/mixers/placement.py`)
    forward(x [B, T, D], layout, state=None) -> (y [B, T, D], state)
    init_state(batch_size, device) -> state        passing a state asks for the next one; None returns None
    initializers() -> {parameter: rule}            for the parameters the module itself owns (`models/init.py`)
    flops_per_token(sequence_length) -> int        forward, two per multiply-add
    sharding() -> Sharding                         how its parameters are cut over tensor ranks (`models/sharding.py`)
    config.num_params(width) -> int
    shared_module(config, width, count) -> Module  class method, only where the mixers of a kind share parameters (None
                                                   where the settings turn that off); with
                                                   config.num_shared_params(width, count)
    shared: tuple[Module, ...]                     attribute, with the same: that module where this mixer reads it, a
                                                   tuple lest it count among the mixer's own submodules; with
                                                   read_shared(), what it takes of it: compiled graphs, which all
                                                   mixers of the kind have in common, end there

The op is called through the parameter-free submodule `core` (`placement.core(op)`), which `parallel/` may wrap.
"""

from dataclasses import field, make_dataclass
from typing import Any

from models.mixers.attention import Attention, LocalAttention
from models.mixers.gated_deltanet import GatedDeltaNet
from models.mixers.hgrn2 import HGRN2
from models.mixers.paralstm import ParaLSTM
from models.mixers.rglru import RGLRU

MIXERS: dict[str, Any] = {
    "attention": Attention,
    "gated_deltanet": GatedDeltaNet,
    "hgrn2": HGRN2,
    "local_attention": LocalAttention,
    "paralstm": ParaLSTM,
    "rglru": RGLRU,
}

MixerConfigs: Any = make_dataclass(
    "MixerConfigs",
    [(name, mixer.config_class | None, field(default=None)) for name, mixer in MIXERS.items()],
    frozen=True,
    kw_only=True,
)
"""One optional entry a registered mixer, each of that mixer's own config class."""
