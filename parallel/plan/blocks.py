"""What each kind of block costs on one rank, as a function of rows and tokens.

Two passes without data over one block of a kind, one of them twice as long, give all of it: what is kept, moved and
computed is a sum of something a pass (as the bf16 copies of weights) and something a token. Attention's products over
pairs of tokens are left to a formula.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.lm import LM
from models.mixers.placement import OpCore
from ops.gated_delta_rule.chunked import chunk_size
from ops.summary import AFFINE_SUMMARIES, CELL_SUMMARIES
from parallel.plan.gathered import gathered
from parallel.plan.passing import Passing
from parallel.plan.state import StateBytes, state_bytes
from parallel.plan.trace import Cost, trace
from parallel.plan.world import imagined_grid
from parallel.regions import Region
from parallel.stages import Stages
from parallel.tensor import shard_tensors
from parallel.vocabulary import shard_vocabulary
from parallel.volume import Split, transition_entries
from training.optimizer import parameter_groups

UNTRACED = {"fla": "triton", "flex": "chunked", "flash_attn": "chunked"}
"""Implementations that cannot run without data, and the one whose tensors are the most alike."""

BASE_LENGTH = 1024
"""Tokens of the shorter pass, where rows are long enough."""

ATTENTION_SHARE = (0.55, 0.45)
"""Of the rate of large products, what attention kernels reach forward and backward (docs/performance.md)."""


@dataclass(frozen=True)
class Kind:
    """A kind of block, or the head: a sum of what is per pass and per token."""

    constant: Cost
    of_token: Cost

    def at(self, tokens: int) -> Cost:
        return self.constant + tokens * self.of_token

    def between(self, other: "Kind", share: float) -> "Kind":
        """This one at 0, `other` at 1."""
        pairs = ((self.constant, other.constant), (self.of_token, other.of_token))
        return Kind(*((1 - share) * a + share * b for a, b in pairs))


class Blocks:
    """The blocks of one model, cut over any number of tensor ranks. Inside an imagined world.

    Args:
        config: the model.
        sequence_length: of its rows.
        bf16: whether under autocast.
        sharded_norms: whether norms and residuals are of a share of the tokens, where there are tensor ranks.
        device_type: for the implementations that `auto` stands for.

    Attributes:
        whole: the model without storage.
    """

    def __init__(
        self, config: ModelConfig, sequence_length: int, *, bf16: bool, sharded_norms: bool, device_type: str
    ) -> None:
        self.config, self.bf16, self.sharded_norms = config, bf16, sharded_norms
        self.device_type, self.sequence_length = device_type, sequence_length
        self.whole = self._model()
        self.cut, self.traced = cache(self._cut), cache(self._cut)  # tracing replaces parameters, tied ones apart
        self.groups, self.kind, self.cost = cache(self._groups), cache(self._kind), cache(self._cost)
        self.exchanged, self.state = cache(self._exchanged), cache(self._state)
        self.sums, self.tied = Passing(config).sums, cache(self._tied)
        self.handed_out = cache(self._handed_out)
        self.entries = {name: p.numel() for name, p in self.whole.named_parameters()}
        self.flops_per_token = self.whole.flops_per_token(sequence_length)
        self.nonlinear = {kind for kind in config.layers if self._mixer(kind).core.op.__name__ in CELL_SUMMARIES}

    def _model(self) -> LM:
        chosen = {op: UNTRACED.get(impl, impl) for op, impl in (self.config.impl or {}).items()}
        with torch.device("meta"):
            return LM(replace(self.config, impl=chosen or None), device_type=self.device_type)

    def _cut(self, tensor: int) -> LM:
        """The share of each of `tensor` ranks, on the meta device."""
        model = self._model()
        region = Region(imagined_grid(tensor, tensor=tensor).axes["tensor"], sliced=self.sharded_norms and tensor > 1)
        shard_tensors(model, region)
        shard_vocabulary(model, region)
        return model

    def _groups(self, tensor: int) -> tuple[tuple[tuple[str, int], ...], ...]:
        """Names and entries of a tensor rank's parameters, by AdamW's groups and in their order."""
        model = self.cut(tensor)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [group["params"] for group in parameter_groups(model, 0.0)]
        return tuple(tuple((names[p], p.numel()) for p in group) for group in groups)

    def local(self, tensor: int) -> dict[str, int]:
        """Entries of a tensor rank's parameters, by name."""
        return dict(chain.from_iterable(self.groups(tensor)))

    def _kind(self, kind: str, tensor: int) -> Kind:
        """Of the blocks whose mixer is called so, or `head`."""
        if tensor > 2 and not self._repeats(kind, tensor):  # a sum of what is whole and what is cut
            return self.kind(kind, 1).between(self.kind(kind, 2), 2 - 2 / tensor)
        model = self.traced(tensor)
        if kind == "head":
            module: Any = model.head

            def call(x: Tensor, layout: Any) -> Tensor:
                labels = torch.zeros(layout.positions.shape, dtype=torch.int64)
                return module(x, labels)[0]
        else:
            module = model.blocks[len(self.config.layers) - 1 - self.config.layers[::-1].index(kind)]

            def call(x: Tensor, layout: Any) -> Tensor:
                return module(x, layout)[0]

        return self._passes(module, call, tensor if self.sharded_norms else 1)

    def _passes(self, module: nn.Module, call: Callable[..., Tensor], parts: int) -> Kind:
        time = max(parts, min(BASE_LENGTH, self.sequence_length // 2) // parts * parts)
        short, long = (
            trace(module, call, (1, t // parts, self.config.width), time=t, bf16=self.bf16) for t in (time, 2 * time)
        )
        return Kind(2 * short - long, (1 / time) * (long - short))

    def _repeats(self, kind: str, tensor: int) -> bool:
        """Whether several parameters' parts stop shrinking somewhere on the way to `tensor` ranks."""
        if kind == "head":
            return False
        mixer = self._mixer(kind)
        return any(cut.repeats and 1 < min(cut.units) < tensor for cut in mixer.sharding().cuts.values())

    def attention_flops(self, kind: str, tensor: int, sequence_length: int) -> float:
        """Forward FLOPs a token of the products over pairs of tokens, on each tensor rank."""
        config = self.config.mixer(kind)
        if not hasattr(config, "kv_heads"):
            return 0.0
        window = min(getattr(config, "window", sequence_length), sequence_length)
        keys_seen = window - window * (window - 1) / (2 * sequence_length)
        return 4.0 * config.heads * config.head_dim * keys_seen / tensor

    def _mixer(self, kind: str) -> Any:
        return self.whole.blocks[self.config.layers.index(kind)].mixer

    def _cost(self, kind: str, split: Split) -> Cost:
        """Of a block, or of the head, on each rank of `split`."""
        return self.kind(kind, split.tensor).at(split.tokens)

    def _state(self, names: frozenset[str], tensor: int, **settings: Any) -> StateBytes:
        """What DeepSpeed holds of the parameters of these names; settings as of `state_bytes`."""
        groups = [[n for name, n in group if name in names] for group in self.groups(tensor)]
        return state_bytes(groups, **settings)

    def _exchanged(self, kind: str, split: Split) -> float:
        """Bytes that a block keeps besides under sequence parallelism: all ranks' summaries, the states between them,
        and keys and values from elsewhere. Of the last slice, which has most."""
        if split.sequence == 1:
            return 0.0
        total, last = 0.0, split.sequence - 1
        module: Any
        for module in self._mixer(kind).modules():
            core = getattr(module, "core", None)
            op = core.op.__name__ if isinstance(core, OpCore) else None
            if op in AFFINE_SUMMARIES or op in CELL_SUMMARIES:
                state = module.init_state(split.rows, "meta")
                shape = (state[-1] if isinstance(state, tuple) else state).shape
                summary = shape.numel() + transition_entries(str(op), shape)
                total += 4.0 / split.tensor * ((split.sequence + 1) * summary + last * shape.numel())
                if op == "gated_delta_rule":  # whose sum is a run of the recurrence: it keeps what that keeps, in fp32
                    _, heads, keys, values = shape
                    chunk = chunk_size(split.slice_time, keys)
                    of_head = keys + 2 * (keys + values) + 2 * chunk + 2 + keys * (keys + values) / chunk
                    total += 4.0 / split.tensor * split.tokens * heads * of_head
            elif op in ("attention", "local_attention"):
                config = module.config
                groups = max(1, config.kv_heads // split.tensor)
                more = max(groups, split.sequence) - groups if op == "attention" else 0
                halo = 0 if op == "attention" else min(config.window - 1, last * split.slice_time)
                tokens = split.tokens * more + split.rows * halo * groups
                total += 2.0 * tokens * config.head_dim * split.narrow
        return total

    def _handed_out(self, tensor: int, ranks: int, persistent: int, reuse_distance: int) -> tuple[int, int]:
        """Entries of its own that each of `ranks` hands out under ZeRO 3: for a microbatch, and once a step, of
        parameters that are whole on all ranks between updates.

        Args:
            persistent: entries up to which a parameter is.
            reuse_distance: as of `gathered`.
        """
        entries = self.local(tensor)
        share = {name: -(-n // ranks) for name, n in entries.items()}
        units = self._used({name: n for name, n in entries.items() if n > persistent})
        times = gathered(units, reuse_distance)
        once = sum(share[name] for name, n in entries.items() if n <= persistent)
        return sum(number * share[name] for name, number in times.items()), once

    def _used(self, entries: Mapping[str, int]) -> list[dict[str, int]]:
        """Of these parameters, those that embedding, blocks and head use, in this order."""
        units: list[dict[str, int]] = [{} for _ in range(len(self.config.layers) + 2)]
        for name, n in entries.items():
            kind, _, rest = name.partition(".")
            index = 1 + int(rest.partition(".")[0]) if kind == "blocks" else len(units) - 1 if kind == "head" else 0
            units[index][name] = n
        if self.config.tie_embeddings:
            units[-1].update({name: n for name, n in units[0].items() if name.startswith("embed.")})
        return units

    def _tied(self, stages: Stages, stage: int, tensor: int) -> int:
        """Entries of each tensor rank of `stage` that other stages hold too."""
        entries = self.local(tensor)
        return sum(entries[name] for name, holders in stages.shared.items() if stage in holders)

    def counts(self, first: int, after: int) -> Counter[str]:
        """How many of the blocks `first` ... `after` - 1 are of each kind."""
        return Counter(self.config.layers[first:after])

    def logits_bytes(self, tokens: int, tensor: int) -> float:
        """What the loss holds for a moment: narrow operands, a tile of logits, and fp32 gradients of both."""
        width, entries = self.config.width, -(-self.config.vocab_size // tensor)
        on_gpu = self.device_type == "cuda"
        tile = (8192, 8192) if self.whole.head.impl == "triton" else (4096, 8192) if on_gpu else (1024, 1024)
        copies = 2 if self.config.logit_soft_cap is not None else 1
        narrow = 0 if not self.bf16 else 2 if on_gpu else 6
        logits = 4.0 * copies * min(tile[0], tokens) * min(tile[1], entries)
        return logits + (tokens + entries) * width * (narrow + 4.0)
