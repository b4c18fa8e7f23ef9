"""Cost of a generated token and size of the state against the length of the context, beside a transformer of ours.

    python -m benchmarks.generation                              64k tokens of context; minutes on a CPU
    python -m benchmarks.generation --contexts 256 1024          a short one

Every stack has the same width, depth and MLP, random weights, and really reads its context, in chunks. Then all of them
take steps of one token in turn, round by round, so that what disturbs the machine disturbs all alike; a figure is the
median over rounds, and a ratio the median of the rounds' ratios. The transformer is full attention, which reads
its whole cache for every token; ours also copies it when a token is added, a share of its cost that does not change how
it grows.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.heading import heading
from benchmarks.measure import timed
from eval.generate import prefill, state_bytes
from models.config import ModelConfig
from models.lm import LM, State
from models.mixers import MixerConfigs
from models.mixers.attention import AttentionConfig, LocalAttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from models.mixers.hgrn2 import HGRN2Config
from models.mixers.paralstm import ParaLSTMConfig
from models.mixers.rglru import RGLRUConfig
from models.mlp import MLPConfig

STACKS = {
    "attention": ("attention",),
    "rglru": ("rglru",),
    "griffin": ("rglru", "rglru", "local_attention"),
    "hgrn2": ("hgrn2",),
    "gated_deltanet": ("gated_deltanet",),
    "paralstm": ("paralstm",),
}
"""Patterns that are repeated to the depth; the first is what the others are held against."""

VOCABULARY = 1024


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one stack at one length of context: milliseconds a token, that over the transformer's in the same rounds, and
    over the stack's own at the shortest context; bytes of the state; seconds it took to read the context."""

    stack: str
    context: int
    step_ms: float
    over_attention: float
    over_shortest: float
    state_bytes: int
    prefill_s: float


def build(stack: str, *, width: int, depth: int, window: int, device: torch.device) -> LM:
    heads = width // 64 or 1
    head_dim = width // heads
    of_attention: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": head_dim}
    pattern = STACKS[stack]
    settings = {
        "attention": AttentionConfig(**of_attention),
        "local_attention": LocalAttentionConfig(**of_attention | {"kv_heads": 1}, window=window),
        "rglru": RGLRUConfig(width=width, gate_blocks=heads),
        "hgrn2": HGRN2Config(heads=heads),
        "gated_deltanet": GatedDeltaNetConfig(heads=heads, head_dim=head_dim, expand_v=1.0),
        "paralstm": ParaLSTMConfig(width=width, heads=heads),
    }
    config = ModelConfig(
        vocab_size=VOCABULARY,
        width=width,
        layers=tuple(pattern[i % len(pattern)] for i in range(depth)),
        mixers=MixerConfigs(**{kind: settings[kind] for kind in set(pattern)}),
        mlp=MLPConfig(width=2 * width),
    )
    return LM(config, device_type=device.type).to(device).eval()


class Reader:
    """A stack somewhere in a text. `states` keeps its state at each context it has come to."""

    def __init__(self, model: LM, device: torch.device) -> None:
        self.model, self.device, self.read, self.seconds = model, device, 0, 0.0
        self.states: dict[int, State] = {0: model.init_state(1, device)}
        self.generator = torch.Generator().manual_seed(0)

    def read_to(self, context: int) -> None:
        """Reads random tokens until `context` of them have been read."""
        input_ids = torch.randint(VOCABULARY, (1, context - self.read), generator=self.generator).to(self.device)
        positions = torch.arange(self.read, context, device=self.device)[None]

        def read() -> None:
            _, self.states[context] = prefill(self.model, input_ids, positions, self.states[self.read])

        self.seconds += timed(read, self.device)
        self.read = context

    def step(self, context: int) -> tuple[float, int]:
        """Seconds of one token after a context, which stays as it is for the next round, and the state's bytes then."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        after: list[State] = []

        def one() -> None:
            after.append(self.model(token, torch.full_like(token, context), state=self.states[context])[1])

        return timed(one, self.device), state_bytes(after[0])


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device) -> list[Figures]:
    """All contexts are read first; then each round takes a step after every one of them, in every stack."""
    sizes = {"width": args.width, "depth": args.depth, "window": args.window}
    contexts = sorted(set(args.contexts))
    readers = {stack: Reader(build(stack, **sizes, device=device), device) for stack in args.stacks}
    read: dict[tuple[str, int], float] = {}
    for stack, reader in readers.items():
        for context in contexts:
            reader.read_to(context)
            read[stack, context] = reader.seconds
        print(f"{stack}: {contexts[-1]:,} tokens read in {reader.seconds:.0f} s", flush=True)
    rounds = []
    for _ in range(args.rounds + 1):
        rounds.append({(stack, context): readers[stack].step(context) for context in contexts for stack in readers})
    found = []
    for context in contexts:
        for stack in readers:

            def against(other: tuple[str, int], mine: tuple[str, int] = (stack, context)) -> float:
                return statistics.median(times[mine][0] / times[other][0] for times in rounds[1:])  # the first warms

            found.append(
                Figures(
                    stack=stack,
                    context=context,
                    step_ms=1e3 * statistics.median(times[stack, context][0] for times in rounds[1:]),
                    over_attention=against(("attention", context)),
                    over_shortest=against((stack, contexts[0])),
                    state_bytes=rounds[0][stack, context][1],
                    prefill_s=read[stack, context],
                )
            )
            print(describe(found[-1]), flush=True)
    return found


def describe(figures: Figures) -> str:
    return (
        f"{figures.context:>7,} {figures.stack:<16}{figures.step_ms:9.2f} ms a token "
        f"{figures.over_attention:7.2f} x attention {figures.over_shortest:7.2f} x its shortest "
        f"{figures.state_bytes / 1e6:9.2f} MB of state"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536], metavar="TOKENS")
    parser.add_argument(
        "--stacks", nargs="+", choices=STACKS, default=list(STACKS), help="attention is always among them"
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--window", type=int, default=1024, help="of Griffin's local attention (1024)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    if min(args.contexts) < 1 or args.rounds < 1 or (args.width % 64 and args.width > 64):
        parser.error("--contexts and --rounds must be at least 1, --width a multiple of 64 or below it")
    args.stacks = list(dict.fromkeys(["attention", *args.stacks]))
    device = torch.device(args.device)
    if args.device == "cpu":
        torch.set_num_threads(1)
    figures = measure(args, device)
    if args.output is not None:
        record = {
            **heading(),
            "settings": {key: getattr(args, key) for key in ("width", "depth", "window", "rounds")},
            "figures": [asdict(row) for row in figures],
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
