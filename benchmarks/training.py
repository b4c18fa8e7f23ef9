"""Times a training step of each family at 1.3B beside flash-linear-attention's model and a transformer of ours.

    python -m benchmarks.training                        on a GPU: 4k tokens of context, then 2k to 128k
    python -m benchmarks.training --families hgrn2 --impl triton --output benchmarks/results/training_h200
    python -m benchmarks.training --rehearse             tiny, on any machine: shows that everything runs, not how fast

A step is forward under bf16 autocast over fp32 weights, backward and fused AdamW, for all contenders alike. A peer has
our weights copied and must give our loss before it is timed. Contenders take steps in turn, round by round; a figure is
the median over rounds, a ratio the median of the rounds' ratios. At 4k nothing is recomputed; over the sweep all
contenders checkpoint every block, as 128k tokens of one row do not fit otherwise.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.heading import heading
from benchmarks.measure import timed
from configs.schema import load_config
from models.config import ModelConfig
from models.hf.formats import TokenIds
from models.hf.registry import choose
from models.lm import LM
from models.mixers import MixerConfigs
from models.mixers.attention import AttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from ops.impl import IMPLEMENTATIONS
from parallel.compiled import compile_blocks
from parallel.config import ParallelConfig
from parallel.recompute import checkpoint_blocks
from training.environment import peak_flops

PRESETS = {
    "griffin": "configs/griffin_1b.yaml",
    "hgrn2": "configs/hgrn2_1p3b.yaml",
    "gated_deltanet": "configs/hgrn2_1p3b.yaml",  # its outer shape, as flash-linear-attention's class has no hybrid
    "paralstm": "configs/paralstm_1b.yaml",
}
PEERS = {"hgrn2": "fla_hgrn2", "gated_deltanet": "fla_gated_deltanet"}
"""The format of flash-linear-attention's class, where there is one."""

SAME_LOSS = 2e-2
"""Relative difference of a peer's loss from ours under bf16."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Tokens of a step at 4k and over the sweep, lengths of the sweep, rounds; `narrow` shrinks the models."""

    tokens: int
    length: int
    sweep_tokens: int
    sweep: tuple[int, ...]
    rounds: int
    narrow: bool = False


FULL = Scale(
    tokens=32768, length=4096, sweep_tokens=131072, sweep=(2048, 4096, 8192, 16384, 32768, 65536, 131072), rounds=10
)
REHEARSAL = Scale(tokens=128, length=64, sweep_tokens=128, sweep=(32, 128), rounds=1, narrow=True)


@dataclass(frozen=True)
class Contender:
    """
    Attributes:
        name: `ours`, `fla` or `transformer`.
        model: on the device, fp32.
        loss: of token ids `[B, T]`, the mean over all but each row's last.
        optimizer: AdamW over all parameters.
    """

    name: str
    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer

    def step(self, input_ids: Tensor) -> None:
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.is_cuda):
            loss = self.loss(input_ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resident_bytes(self) -> int:
        """Weights and moments, between steps."""
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [z for state in self.optimizer.state.values() for z in state.values() if isinstance(z, Tensor)]
        return sum(z.numel() * z.element_size() for z in held if z.device.type == "cuda")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one contender at one shape. Ratios are ours / theirs in tokens a second; memory is its own alone."""

    family: str
    contender: str
    rows: int
    length: int
    checkpointed: bool
    tokens_per_second: float
    ours_over_theirs: float
    model_flops_utilisation: float | None
    peak_gb: float | None


def configuration(family: str, impl: str | None, narrow: bool) -> ModelConfig:
    """The family's preset; `narrow` with two blocks 64 wide."""
    if narrow:
        config = load_config(f"configs/debug_{'rglru' if family == 'griffin' else family}.yaml", []).model
        config = replace(config, layers=config.layers[:2])
    else:
        config = load_config(PRESETS[family], []).model
    if family == "gated_deltanet":
        heads = max(1, config.width // 256)
        mixer = GatedDeltaNetConfig(heads=heads, head_dim=config.width // heads, expand_v=1.0, conv_bias=False)
        layers = ("gated_deltanet",) * len(config.layers)
        config = replace(config, layers=layers, mixers=MixerConfigs(gated_deltanet=mixer), post_norm=())
    chosen = {op: impl for op, known in IMPLEMENTATIONS.items() if impl in known} if impl else None
    return replace(config, impl=chosen)


def transformer(config: ModelConfig) -> ModelConfig:
    """Full attention instead of every mixer, otherwise the same."""
    head_dim = min(128, config.width)
    heads = config.width // head_dim
    mixer = AttentionConfig(heads=heads, kv_heads=heads, head_dim=head_dim)
    layers = ("attention",) * len(config.layers)
    return replace(config, layers=layers, mixers=MixerConfigs(attention=mixer), post_norm=())


def contender(name: str, model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Contender:
    fused = next(model.parameters()).is_cuda
    return Contender(name, model, loss, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused))


def of_ours(name: str, config: ModelConfig, device: torch.device, checkpointed: bool, compiled: bool) -> Contender:
    model = LM(config, device_type=device.type).to(device)
    if compiled:
        compile_blocks(model, device.type)
    if checkpointed:
        checkpoint_blocks(model, ParallelConfig(activation_checkpointing="full"))

    def loss(input_ids: Tensor) -> Tensor:
        rows, length = input_ids.shape
        labels = torch.cat([input_ids[:, 1:], input_ids.new_full((rows, 1), -100)], dim=1)
        positions = torch.arange(length, device=input_ids.device).expand(rows, -1)
        return model(input_ids, positions, labels)[0].sum() / (rows * (length - 1))

    return contender(name, model, loss)


def of_fla(family: str, ours: LM, device: torch.device, checkpointed: bool) -> Contender:
    """flash-linear-attention's class with our weights; its layers need a GPU."""
    from fla import models as theirs

    form = choose(ours.config, PEERS[family])
    values = form.config_json(ours.config, TokenIds()) | {"use_cache": False}
    architecture = values.pop("architectures")[0]
    settings = getattr(theirs, architecture.replace("ForCausalLM", "Config"))(**values)
    model = getattr(theirs, architecture)(settings).to(device)
    parameters = dict(ours.named_parameters())
    stored = form.tensors(ours.config, {key: tuple(value.shape) for key, value in parameters.items()})
    model.load_state_dict({tensor.name: tensor.cut(parameters[tensor.source].detach()) for tensor in stored})
    if checkpointed:
        model.gradient_checkpointing_enable()
    return contender("fla", model.train(), lambda input_ids: model(input_ids, labels=input_ids).loss)


def require_equal(ours: Contender, peer: Contender, input_ids: Tensor) -> None:
    """Raises SystemExit if a peer with our weights computes something else."""
    with torch.no_grad(), torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.is_cuda):
        wanted, found = float(ours.loss(input_ids)), float(peer.loss(input_ids))
    if not abs(found - wanted) <= SAME_LOSS * wanted:
        raise SystemExit(f"{peer.name}: loss {found:.4f} where ours is {wanted:.4f}; what differs is not compared")


def measure(family: str, contenders: list[Contender], scale: Scale, length: int, checkpointed: bool) -> list[Figures]:
    """`scale.rounds` rounds of steps at one shape."""
    ours = contenders[0]
    device = next(ours.model.parameters()).device
    tokens = scale.sweep_tokens if checkpointed else scale.tokens
    generator = torch.Generator(device).manual_seed(0)
    vocabulary: Any = ours.model.config.vocab_size  # type: ignore[union-attr]
    input_ids = torch.randint(vocabulary, (tokens // length, length), generator=generator, device=device)
    seconds: dict[str, list[float]] = {each.name: [] for each in contenders}
    peaks: dict[str, float | None] = {}
    for each in contenders:
        each.step(input_ids)  # compiles, and makes the moments
        peaks[each.name] = _peak_gb(each, input_ids)
    for _ in range(scale.rounds):
        for each in contenders:
            seconds[each.name].append(timed(partial(each.step, input_ids), device))
    peak = peak_flops(device)
    figures = []
    for each in contenders:
        speed = tokens / statistics.median(seconds[each.name])
        like = ours if each.name == "fla" else each
        flops = 3 * like.model.flops_per_token(length)  # type: ignore[operator]
        figures.append(
            Figures(
                family=family,
                contender=each.name,
                rows=tokens // length,
                length=length,
                checkpointed=checkpointed,
                tokens_per_second=speed,
                ours_over_theirs=statistics.median(b / a for a, b in zip(seconds[ours.name], seconds[each.name])),
                model_flops_utilisation=None if peak is None else speed * flops / peak,
                peak_gb=peaks[each.name],
            )
        )
    return figures


def _peak_gb(each: Contender, input_ids: Tensor) -> float | None:
    """Of a step, without what the other contenders hold meanwhile; None on a CPU."""
    if not input_ids.is_cuda:
        each.step(input_ids)
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    each.step(input_ids)
    return (torch.cuda.max_memory_allocated() - before + each.resident_bytes()) / 1e9


def compare(family: str, impl: str | None, scale: Scale, device: torch.device, compiled: bool) -> list[Figures]:
    """Both parts: 4k without recomputation, and the sweep with it; our models' blocks compiled or not."""
    figures = []
    for checkpointed, lengths in ((False, (scale.length,)), (True, scale.sweep)):
        config = configuration(family, impl, scale.narrow)
        contenders = [of_ours("ours", config, device, checkpointed, compiled)]
        if family in PEERS and device.type == "cuda":
            contenders.append(of_fla(family, contenders[0].model, device, checkpointed))  # type: ignore[arg-type]
            require_equal(contenders[0], contenders[1], torch.arange(2048, device=device).view(1, -1))
        contenders.append(of_ours("transformer", transformer(config), device, checkpointed, compiled))
        for length in lengths:
            figures += measure(family, contenders, scale, length, checkpointed)
            for row in figures[-len(contenders) :]:
                print(describe(row), flush=True)
        del contenders
    return figures


def describe(row: Figures) -> str:
    told = f"{row.family} B{row.rows} T{row.length} {row.contender}: {row.tokens_per_second:,.0f} tokens/s"
    if row.contender != "ours":
        told += f", ours/theirs {row.ours_over_theirs:.2f}"
    if row.model_flops_utilisation is not None:
        told += f", MFU {row.model_flops_utilisation:.1%}"
    return told if row.peak_gb is None else f"{told}, {row.peak_gb:.1f} GB"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=tuple(PRESETS), default=list(PRESETS))
    parser.add_argument("--impl", choices=("reference", "chunked", "triton", "fla"), help="of every op that has it")
    parser.add_argument("--compile", action="store_true", help="the blocks of our models, as parallel.compile does")
    parser.add_argument("--rehearse", action="store_true", help="tiny models and shapes, also without a GPU")
    parser.add_argument("--output", type=Path, help="NAME.json is written")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.rehearse:
        parser.error("there is no GPU here; --rehearse runs everything but flash-linear-attention's layers on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = REHEARSAL if args.rehearse else FULL
    figures = [row for family in args.families for row in compare(family, args.impl, scale, device, args.compile)]
    if args.output is not None:
        record = {
            **heading(),
            "compiled": args.compile,
            "results": [asdict(row) for row in figures],
        }
        args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
