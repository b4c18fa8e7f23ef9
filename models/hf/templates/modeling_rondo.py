"""Rondo's language model under transformers' conventions: `LM` does the work, this file reads and names.

What is not convention is padding. Every padding token counts as a document of its own at position 0, so that nothing of
it reaches a convolution, a state or a key that another token sees: a row of a padded batch gives what it gives alone.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from models.config import ModelConfig
from models.hf.templates.configuration_rondo import RondoConfig
from models.hf.templates.recurrent_cache import RecurrentCache
from models.init import parameter_generator
from models.lm import LM
from models.norm import RMSNorm
from models.plain import from_plain
from ops import Layout

IGNORED = -100
"""The label where there is no target."""


class RondoForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model over any stack of Rondo's mixers."""

    config_class = RondoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a state cannot be rolled back: no assistant model
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012, as the base class has it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: RondoConfig) -> None:
        super().__init__(config)
        self.model = LM(from_plain(ModelConfig, config.model, "config.json: model"))
        self.gradient_checkpointing = False
        # A rounded decay is another memory, the more so the longer it lasts: these stay fp32 whatever `dtype` says.
        self._keep_in_fp32_modules_strict = sorted({re.escape(re.sub(r"^blocks\.\d+", "", n)) for n in self.precise()})
        self.post_init()

    def precise(self) -> list[str]:
        """The parameters of `model` that are not the matrices and taps of maps: those that mixers own themselves, as
        decays and recurrent weights, what mixers share, and the weights of norms."""
        owners = [(f"blocks.{i}.mixer", block.mixer) for i, block in enumerate(self.model.blocks)]
        modules = list(self.model.named_modules())
        owners += [(name, module) for name, module in modules if isinstance(module, RMSNorm)]
        owners += [(name, module) for name, module in modules if name.startswith("shared.")]
        return [f"{name}.{key}" for name, owner in owners for key, _ in owner.named_parameters(recurse=False)]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What no file gave starts as in training, by the parameter's name and seed 0."""
        name = next((name for name, known in self.model.named_modules() if known is module), None)
        own: Any = getattr(module, "initializers", dict)
        rules = own() if name is not None else {}
        for key, rule in rules.items():
            parameter = module.get_parameter(key)
            if not getattr(parameter, "_is_hf_initialized", False):
                values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                rule(values, parameter_generator(0, f"{name}.{key}"))
                parameter.copy_(values)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: `[B, T]`, or `[B, S + T]` after S cached tokens; 0 for padding, on the left or on the right.
                A row that ends in padding cannot be continued.
            position_ids: int64 `[B, T]` or `[1, T]`, counting from 0 in each document where a row packs several; by
                default a row is one document.
            past_key_values: of the tokens before these; is written to.
            labels: int64 `[B, T]`, the `input_ids`, -100 where there is no target. A document's first token is none.
            use_cache: return the state; by default the configuration's, and not while training.
            output_hidden_states: return the stream `[B, T, D]` before each block and after the final norm.
            logits_to_keep: only the last so many tokens' logits, or those at these indices; 0 for all.
            num_items_in_batch: what to divide the summed loss by; by default the targets of this call.

        Returns:
            loss, a scalar; logits `[B, T, N]`, at least fp32; past_key_values; hidden_states.

        Raises:
            ValueError: the padding is between tokens of a document, or an argument has a wrong shape.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: not taken, as embeddings are scaled inside; pass input_ids")
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache: Any = past_key_values
        if cache is None and use_cache and not checkpointing:
            cache = RecurrentCache()
        positions = self._positions(input_ids, attention_mask, position_ids, cache)
        x, hidden_states = self._stream(input_ids, Layout(positions), cache, bool(output_hidden_states), checkpointing)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        whole = labels is not None or isinstance(kept, int)
        logits = self.model.head(x if whole else x[:, kept])
        loss = None if labels is None else _loss(logits, labels, positions, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits[:, kept] if labels is not None and not isinstance(kept, int) else logits,
            past_key_values=cache if use_cache else None,
            hidden_states=hidden_states,
        )

    def _stream(
        self, input_ids: Tensor, layout: Layout, cache: RecurrentCache | None, keep: bool, checkpointing: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The stream after the last block, `[B, T, D]`, and if `keep` what it was before each and is after the norm."""
        state: Any = None if cache is None else cache.state
        if cache is not None and state is None:
            state = self.model.init_state(len(input_ids), input_ids.device)
        x = self.model.embed(input_ids)
        seen, new_state = [], []
        for i, block in enumerate(self.model.blocks):
            seen.append(x)
            before = None if state is None else state[i]
            if checkpointing:
                x, after = self._gradient_checkpointing_func(block.__call__, x, layout, before)
            else:
                x, after = block(x, layout, before)
            new_state.append(after)
        if cache is not None:
            cache.state = tuple(new_state)
        return x, (*seen, self.model.head.norm(x)) if keep else None

    def _positions(
        self, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: RecurrentCache | None
    ) -> Tensor:
        """Each token's index in its document, int64 `[B, T]`, 0 for padding; the cache is told what comes next."""
        batch, time = input_ids.shape
        before = 0 if cache is None else cache.num_tokens
        if mask is not None and mask.shape not in ((batch, time), (batch, before + time)):
            raise ValueError(
                f"attention_mask: {list(mask.shape)}; must be [B, T] = {[batch, time]}"
                + (f", or {[batch, before + time]} with the cached tokens" if before else "")
            )
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask[:, -time:].to(torch.bool)
        first = None if cache is None else cache.next_positions
        start = input_ids.new_zeros(batch, 1) if first is None else first.unsqueeze(1)
        if positions is None:
            positions = start + real.cumsum(1) - 1
        positions = torch.where(real, positions.expand(batch, time), 0)
        if mask is not None and not torch.compiler.is_compiling():
            self._check_padding(real, positions, start, cache)
        if cache is not None:
            cache.next_positions = torch.where(real[:, -1], positions[:, -1] + 1, 0)
            cache.num_tokens = before + time
        return positions

    @staticmethod
    def _check_padding(real: Tensor, positions: Tensor, start: Tensor, cache: RecurrentCache | None) -> None:
        """Raises ValueError where padding lies inside a document. Waits for an accelerator, but not token by token."""
        if cache is not None and cache.closed:
            raise ValueError("attention_mask: a row of the cache ends in padding; to continue rows, pad on the left")
        if real.shape[1] == 1 and real.device.type != "cpu":
            return
        inside = real[:, 1:] & ~real[:, :-1] & (positions[:, 1:] != 0)
        ends = ~real[:, -1:] & (real.any(1, keepdim=True) | (start > 0))
        broken, closed = torch.stack([inside.any(), ends.any()]).tolist()
        if broken:
            raise ValueError("attention_mask: padding between tokens of a document; pad on the left or on the right")
        if cache is not None:
            cache.closed = closed

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> Any:
        """The cache exists before the first call, which reading a prompt in chunks needs."""
        base: Any = super()
        base._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RecurrentCache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _loss(logits: Tensor, labels: Tensor, positions: Tensor, count: Tensor | int | None) -> Tensor:
    """The mean nll of each token after its document's first, given those before it."""
    targets = labels.masked_fill(positions == 0, IGNORED)[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    return total / ((targets != IGNORED).sum().clamp_min(1) if count is None else count)
