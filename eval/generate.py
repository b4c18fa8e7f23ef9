"""Text from a trained model, one token at a time through its state: `python -m eval.generate MODEL --prompt TEXT`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from eval.load import load
from models.lm import LM

PREFILL_CHUNK = 512
"""Prompt tokens read at once: bounds the memory of the logits that come with them."""


@torch.no_grad()
def generate(
    model: LM,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt, and returns the continuations without EOS.

    Shorter prompts are padded on the left. Every padding token has position 0, so it is a document of its own that
    nothing after it sees, and each prompt's first token has position 0 too: rows do not depend on one another.

    Args:
        prompts: token ids, BOS included; at least one each.
        max_tokens: the most tokens added to a prompt.
        eos_id: ends a continuation; None lets all run to max_tokens.
        vocab_size: only tokens below it are chosen, which a padded embedding needs; None takes the whole embedding.
        temperature: divides the logits; 0 always takes the most likely token.
        top_p: samples among the fewest tokens that hold this share of the probability (Holtzman et al., 2020).
        seed: of the draws, which take nothing from torch's global generator. A row's draws depend on seed and row.

    Raises:
        ValueError: a prompt is empty, or a setting is out of range.
    """
    _check(prompts, max_tokens, temperature, top_p)
    device = model.embed.weight.device
    draws = torch.rand(len(prompts), max_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    longest = max(len(prompt) for prompt in prompts)
    pads = [longest - len(prompt) for prompt in prompts]
    input_ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts)], device=device)
    positions = torch.tensor([[0] * pad + list(range(longest - pad)) for pad in pads], device=device)

    state = model.init_state(len(prompts), device)
    for start in range(0, longest, PREFILL_CHUNK):
        chunk = slice(start, start + PREFILL_CHUNK)
        logits, state = model(input_ids[:, chunk], positions[:, chunk], state=state)
    chosen: list[Tensor] = []
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_tokens):
        token = _choose(logits[:, -1, :vocab_size], draws[:, step], temperature, top_p)  # [B]
        chosen.append(token)
        if eos_id is not None:
            running &= token != eos_id
        if step + 1 == max_tokens or not running.any():
            break
        positions = positions[:, -1:] + 1
        logits, state = model(token.unsqueeze(1), positions, state=state)
    return [_until(eos_id, row) for row in torch.stack(chosen, dim=1).tolist()]


def sample_text(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """Each prompt, as the beginning of a document, with its continuation (`generate`)."""
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    continuations = generate(
        model,
        ids,
        max_tokens=max_tokens,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return [tokenizer.decode([*prompt, *added]) for prompt, added in zip(ids, continuations, strict=True)]


def _choose(logits: Tensor, draw: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row by inverting the cumulative distribution at `draw`; `[B, N], [B] -> [B]`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = torch.softmax(logits.double() / temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    mass = probabilities.cumsum(dim=-1)
    kept = ((mass - probabilities) < top_p).sum(dim=-1, keepdim=True)  # tokens before which less than top_p lies
    target = draw.double().unsqueeze(1) * mass.gather(1, kept - 1)
    rank = torch.searchsorted(mass, target, right=True).minimum(kept - 1)
    return order.gather(1, rank).squeeze(1)


def _until(eos_id: int | None, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id is not None and eos_id in tokens else tokens


def _check(prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, top_p: float) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}]: empty; a prompt is at least one token, for example BOS")
    if not prompts:
        raise ValueError("prompts: none; give at least one")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}; must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature}; must not be negative, 0 is greedy")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: {top_p}; must lie in 0 to 1, 0 excluded")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.generate",
        description="Continue texts with a trained model.",
        epilog='example: python -m eval.generate runs/demo --prompt "def main(" --max-tokens 100 --seed 1',
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run directory or checkpoint")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the beginning of a document, may be given several times; empty if absent",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="the most tokens added to a prompt (128)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (0.8)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="share of probability sampled from (0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds give equal texts (0)")
    parser.add_argument(
        "--greedy", action="store_true", help="always the most likely token; the same as --temperature 0"
    )
    parser.add_argument("--device", type=_device, help="cpu or cuda; a GPU if there is one")
    return parser


def _device(value: str) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(value)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < gpus):
        return device
    here = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
    raise argparse.ArgumentTypeError(f"value {value!r}; this machine has {here}; choose one, or leave --device out")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    temperature = 0.0 if options.greedy else options.temperature
    try:
        _check([[0]], options.max_tokens, temperature, options.top_p)
    except ValueError as error:
        parser.error(str(error))
    try:
        model, tokenizer = load(options.model, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        texts = sample_text(
            model,
            tokenizer,
            options.prompt or [""],
            max_tokens=options.max_tokens,
            temperature=temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
    except (ValueError, OSError) as error:
        print(f"eval.generate: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
