"""The configuration of a `RondoForCausalLM`."""

from typing import Any

from transformers import PreTrainedConfig


class RondoConfig(PreTrainedConfig):
    """
    Args:
        model: the fields of `ModelConfig`, as plain values: width, layers, the settings of each mixer and of the MLP.
        use_cache: return the state, to go on from, outside training.
        kwargs: what every configuration takes.
    """

    model_type = "rondo"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, model: dict[str, Any] | None = None, use_cache: bool = True, **kwargs: Any) -> None:
        self.model = model or {}
        self.use_cache = use_cache
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(key, None)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.model["vocab_size"]

    @property
    def hidden_size(self) -> int:
        return self.model["width"]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.model["layers"])

    @property
    def tie_word_embeddings(self) -> bool:
        return self.model.get("tie_embeddings", True)
