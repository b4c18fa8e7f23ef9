"""Settings of the mixers that cannot be, as a user meets them: one line with key, value, requirement and way out."""

import re

import pytest

from configs.schema import ConfigError, load_config

REFUSALS = {
    "gated_deltanet": [
        ("value_heads=3", r"value_heads: 3; must be a positive multiple of heads \(2\): choose e.g. 4$"),
        ("value_heads=0", r"value_heads: 0; must be a positive multiple of heads \(2\): choose e.g. 2$"),
        ("expand_v=1.3", r"expand_v: 1.3; times head_dim \(16\) must be a whole number .* choose e.g. 1.3125$"),
        ("heads=1.5", r"heads: 1.5; must be a valid integer; correct it in the YAML"),
        ("heads=0", "heads: 0; must be at least 1$"),
        ("conv_width=0", "conv_width: 0; must be at least 1$"),
        ("head=2", r"head: 2; there is no such key; did you mean heads\?$"),
        ("output_gate=1", "output_gate: 1; must be a valid boolean"),
    ],
    "hgrn2": [
        ("heads=5", r"heads: 5; must divide the model's width \(64\): choose e.g. 4$"),
        ("expand_ratio=1.5", "expand_ratio: 1.5; must be a valid integer"),
        ("heads=null", "heads, expand_ratio: both null; give one, for example expand_ratio: 128$"),
        ("conv_bias=true", "conv_bias: true without a convolution; set conv_width, for example 4$"),
    ],
    "paralstm": [
        ("width=30", r"width: 30; must be a positive multiple of heads \(4\): choose e.g. width 32$"),
        ("heads=3", r"width: 128; must be a positive multiple of heads \(3\): choose e.g. width 129$"),
        ("heads=0", "heads: 0; must be at least 1$"),
        ("weight_limit=0.0", "weight_limit: 0.0; must be positive, or null for none$"),
        (
            "input_projection=false",
            r"width: 128; must be the model's width \(64\) .* set it to 64, or input_projection",
        ),
        ("conv_activation=relu", "conv_activation: \"relu\"; must be 'silu'"),
        ("forget_bias=3", "forget_bias: 3; must be a valid array"),
    ],
    "rglru": [
        ("gate_blocks=3", r"width: 128; must be a positive multiple of gate_blocks \(3\): choose e.g. width 129$"),
        ("gate_blocks=0", "gate_blocks: 0; must be at least 1$"),
        ("decay_init=long", "decay_init: \"long\"; must be 'recurrentgemma' or 'paper'"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [(kind, *case) for kind, cases in REFUSALS.items() for case in cases],
)
def test_impossible_settings_are_refused_in_one_line(kind: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(f"configs/debug_{kind}.yaml", [f"model.mixers.{kind}.{override}"])
    (line,) = str(caught.value).splitlines()
    assert re.match(rf"model\.mixers\.{kind}\.{message}", line), line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layers=[hgrn, hgrn2]", r"layers: 'hgrn' is no mixer; choose from attention, .*; did you mean hgrn2\?$"),
        ("layers=[gated_delta_net]", r"layers: 'gated_delta_net' is no mixer; .*; did you mean gated_deltanet\?$"),
        ("layers=[para_lstm]", r"layers: 'para_lstm' is no mixer; .*; did you mean paralstm\?$"),
        ("layers=[rglru]", "layers: 'rglru' has no settings; add them under mixers.rglru$"),
        ("mixers.paralstn={width: 64}", r"mixers.paralstn: .*; there is no such key; did you mean paralstm\?$"),
        ("mixers.hgrn2={expand_ratio: 12}", r"mixers.hgrn2.expand_ratio: 12; must divide .* \(64\): choose e.g. 8$"),
        (
            "mixers.attention={heads: 4, kv_heads: 3, head_dim: 16}",
            r"mixers.attention.heads: 4; must be a positive multiple of kv_heads \(3\): choose e.g. 3$",
        ),
        ("post_norm=[hgrn]", "post_norm: 'hgrn' is the mixer of no layer; choose from hgrn2$"),
    ],
)
def test_stacks_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.{message}"):
        load_config("configs/debug_hgrn2.yaml", [f"model.{override}"])
