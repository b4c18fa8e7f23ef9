"""Text from a trained model, one token at a time through its state: `python -m eval.generate MODEL --prompt TEXT`."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from data.tokenizer import Tokenizer
from eval.load import default_device, device_here, load
from eval.sampling import Sampling, choose, draws, penalized
from eval.stops import TextStream
from models.lm import LM, State

PREFILL_CHUNK = 512
"""Prompt tokens read at once: bounds the memory that a long prompt takes beside the state."""


class TextTokenizer(Protocol):
    """`data.tokenizer.Tokenizer`, or what stands for it."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Any) -> str: ...


@torch.no_grad()
def continuations(
    model: LM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    vocab_size: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """The next token of every row, `sampling.max_tokens` times, or until the caller has enough.

    Args:
        prompts: token ids, BOS included; at least one each.
        vocab_size: only tokens below it are chosen, which a padded embedding needs; None takes the whole embedding.
        rows: numbers by which rows draw; 0, 1, 2 ... by default.

    Raises:
        ValueError: there is no prompt, or one is empty or holds what is no token of the model.
    """
    check_prompts(prompts, model.config.vocab_size)
    device = model.embed.weight.device
    drawn = draws(sampling.seed, rows or range(len(prompts)), sampling.max_tokens).to(device)
    input_ids, positions = left_padded(prompts, device)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True

    state: State | None
    x, state = prefill(model, input_ids, positions)
    for step in range(sampling.max_tokens):
        logits = model.head(x)[:, 0]
        if seen is not None:
            logits = penalized(logits, seen, sampling.repetition_penalty)
        token = choose(logits[:, :vocab_size], drawn[:, step], sampling)  # [B]
        yield token.tolist()
        if step + 1 < sampling.max_tokens:
            if seen is not None:
                seen.scatter_(1, token.unsqueeze(1), True)
            positions = positions[:, -1:] + 1
            x, state = model.hidden(token.unsqueeze(1), positions, state)


def left_padded(prompts: Sequence[Sequence[int] | np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Input ids and positions, int64 `[B, T]`, of prompts of unequal length, the shorter ones padded on the left.

    Every padding token has position 0, so it is a document of its own that nothing after it sees, and each prompt's
    first token has position 0 too: rows do not depend on one another.
    """
    longest = max(len(prompt) for prompt in prompts)
    input_ids, positions = np.zeros((2, len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = prompt
        positions[row, longest - len(prompt) :] = np.arange(len(prompt))
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(positions).to(device)


def prefill(model: LM, input_ids: Tensor, positions: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Reads `[B, T]` tokens in chunks, from the beginning or after those of `state`; returns what the head reads of the
    last one, `[B, 1, D]`, and the state."""
    state = model.init_state(len(input_ids), input_ids.device) if state is None else state
    for start in range(0, input_ids.shape[1], PREFILL_CHUNK):
        chunk = slice(start, start + PREFILL_CHUNK)
        x, state = model.hidden(input_ids[:, chunk], positions[:, chunk], state)
    assert state is not None
    return x[:, -1:], state


def state_bytes(state: State) -> int:
    """Memory that a state keeps alive."""
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in tree_leaves(state)}
    return sum(storages.values())


def generate(
    model: LM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Each prompt's continuation (`continuations`) up to EOS, which is left out; None lets all run to max_tokens."""
    added: list[list[int]] = [[] for _ in prompts]

    def take(row: int, token: int) -> bool:
        added[row].append(token)
        return True

    _run(continuations(model, prompts, sampling, vocab_size=vocab_size, rows=rows), eos_id, take)
    return added


def generate_texts(
    model: LM,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stops: Sequence[str] = (),
    rows: Sequence[int] | None = None,
) -> list[str]:
    """Each prompt's continuation up to EOS or the first stop string, which is left out."""
    streams = [TextStream(tokenizer.decode, stops) for _ in prompts]
    texts = [""] * len(prompts)

    def take(row: int, token: int) -> bool:
        texts[row] += streams[row].feed(token)
        return not streams[row].stopped

    steps = continuations(model, prompts, sampling, vocab_size=tokenizer.vocab_size, rows=rows)
    _run(steps, tokenizer.eos_id, take)
    return [text + stream.close() for text, stream in zip(texts, streams)]


def stream_text(
    model: LM, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling, *, stops: Sequence[str] = ()
) -> Iterator[str]:
    """The pieces of one continuation of `generate_texts`, each as soon as it is certain."""
    stream = TextStream(tokenizer.decode, stops)
    for (token,) in continuations(model, [prompt], sampling, vocab_size=tokenizer.vocab_size):
        if token == tokenizer.eos_id or stream.stopped:
            break
        yield stream.feed(token)
    yield stream.close()


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
    """Each prompt, as the beginning of a document, with its continuation."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    texts = generate_texts(model, tokenizer, [_document(tokenizer, prompt) for prompt in prompts], sampling)
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ValueError unless there are prompts, each of at least one token below `vocab_size`."""
    if not prompts:
        raise ValueError("prompts: none; give at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}]: empty; a prompt is at least one token, for example BOS")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ValueError(
                f"prompts[{i}]: token {wrong}; the model has tokens 0 to {vocab_size - 1}; use the tokenizer that it "
                "was trained with"
            )


def _run(steps: Iterator[list[int]], eos_id: int | None, take: Callable[[int, int], bool]) -> None:
    """Hands each row its tokens until it has come to EOS or `take` has had enough, and stops once all have."""
    running: list[int] | None = None
    for tokens in steps:
        rows = range(len(tokens)) if running is None else running
        running = [row for row in rows if tokens[row] != eos_id and take(row, tokens[row])]
        if not running:
            return


def _document(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.generate",
        description="Continue texts with a trained model. One text is written as it comes, several at their end.",
        epilog='example: python -m eval.generate runs/demo --prompt "def main(" --max-tokens 100 --stop "def "',
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="run directory or checkpoint")
    add("--prompt", action="append", metavar="TEXT", help="the beginning of a document; several make a batch; or none")
    add("--max-tokens", type=int, default=128, metavar="N", help="the most tokens added to a prompt (128)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (0.8)")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens; all if absent")
    add("--top-p", type=float, default=0.95, metavar="P", help="share of probability sampled from (0.95)")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 shuns tokens of the text (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--seed", type=int, default=0, metavar="N", help="equal seeds give equal texts (0)")
    add("--greedy", action="store_true", help="always the most likely token; the same as --temperature 0")
    add("--device", type=device_here, help="cpu or cuda; a GPU if there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        sampling = Sampling(
            max_tokens=options.max_tokens,
            temperature=0.0 if options.greedy else options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    texts = options.prompt or [""]
    try:
        model, tokenizer = load(options.model, options.device or default_device())
        prompts = [_document(tokenizer, text) for text in texts]
        if len(prompts) == 1:
            print(texts[0], end="", flush=True)
            for piece in stream_text(model, tokenizer, prompts[0], sampling, stops=options.stop):
                print(piece, end="", flush=True)
            print()
        else:
            added = generate_texts(model, tokenizer, prompts, sampling, stops=options.stop)
            print("\n\n".join(text + more for text, more in zip(texts, added, strict=True)))
    except (ValueError, OSError) as error:
        print(f"eval.generate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
