"""A Hugging Face directory through its own class in transformers: for models that Rondo does not import.

Classes differ in what they get right. Here none is trusted with padding on the left, nor with a cache that is
continued by several tokens: rows are scored from their beginning, padded on the right alone, and prompts are continued
together with others of their own length only. What transformers samples depends on the rows beside it: prompts that
are sampled from are continued one by one, each with a seed of its own.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.synthetic import NO_TARGET
from eval.load import check_vocabulary
from eval.model import Row, Scores, batches, check_rows
from eval.sampling import Sampling

POSITION_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
"""Keys of config.json that bound the tokens of a row."""


class ForeignTokenizer:
    """A tokenizer of transformers as `eval.model.TextTokenizer`. BOS is EOS where there is none."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        bos_id, eos_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if eos_id is None:
            raise ValueError(f"{directory}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json")
        self.bos_id: int = eos_id if bos_id is None else bos_id
        self.eos_id: int = eos_id
        self.vocab_size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Any) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class ForeignModel:
    """`eval.model.EvalModel` over `AutoModelForCausalLM`, in fp32."""

    generates = True

    def __init__(
        self,
        directory: Path,
        device: torch.device | str = "cpu",
        *,
        batch_size: int = 8,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.tokenizer = ForeignTokenizer(directory, trust_remote_code=trust_remote_code)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
        model: Any = self.model
        model.to(device).eval()
        self.device, self.batch_size = torch.device(device), batch_size
        self.vocab_size: int = self.tokenizer.vocab_size
        self._entries: int = self.model.get_output_embeddings().weight.shape[0]
        check_vocabulary(f"{directory}: its tokenizer", self.vocab_size, self._entries)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        limits = [config[key] for key in POSITION_LIMITS if isinstance(config.get(key), int)]
        self.longest: int | None = min(limits, default=None)

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[Scores]:
        check_rows(rows, self._entries, self.longest, "shorten the context, or take fewer examples (--num-fewshot)")
        results: dict[int, Scores] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
        for group in batches(order, self.batch_size):
            input_ids = torch.zeros(len(group), len(rows[group[0]].input_ids), dtype=torch.int64, device=self.device)
            for n, i in enumerate(group):
                input_ids[n, : len(rows[i].input_ids)] = torch.from_numpy(rows[i].input_ids)
            logits = self.model(input_ids, use_cache=False).logits
            for n, i in enumerate(group):
                results[i] = _scores(logits[n, : len(rows[i].labels)], rows[i].labels)
        return [results[i] for i in range(len(rows))]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        return self._in_batches(prompts, sampling, lambda tokens: tokens)

    def generate_texts(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stops: Sequence[str] = ()
    ) -> list[str]:
        def text(tokens: list[int]) -> str:
            return until(self.tokenizer.decode(tokens), stops)

        return self._in_batches(prompts, sampling, text, lambda tokens: until_found(self.tokenizer, tokens, stops))

    def _in_batches(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        result: Callable[[list[int]], Any],
        finished: Callable[[list[int]], bool] = lambda tokens: False,
    ) -> list[Any]:
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{i}]: empty; a prompt is at least one token, for example BOS")
            if self.longest is not None and len(prompt) + sampling.max_tokens > self.longest:
                raise ValueError(
                    f"prompts[{i}]: {len(prompt)} tokens and {sampling.max_tokens} to add; at most {self.longest} have "
                    "a position; shorten the prompt, or ask for fewer tokens"
                )

        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(i)
        at_once = self.batch_size if sampling.temperature == 0 else 1
        results: dict[int, Any] = {}
        for members in by_length.values():
            for group in batches(members, at_once):
                added = self._continue([prompts[i] for i in group], sampling, group[0], finished)
                results |= zip(group, map(result, added), strict=True)
        return [results[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _continue(
        self, prompts: list[Sequence[int]], sampling: Sampling, number: int, finished: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Of prompts of equal length, by the class's own `generate`; without EOS and what comes after it. One that is
        sampled from draws by its `number`."""
        input_ids = torch.tensor(prompts, device=self.device)
        length = input_ids.shape[1]
        settings: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            settings |= {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k or 0,
                "top_p": sampling.top_p,
            }

        def stop(ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
            return torch.tensor([finished(row[length:].tolist()) for row in ids], device=ids.device)

        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence([sampling.seed, number]).generate_state(1)[0]))
            out = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=sampling.max_tokens,
                repetition_penalty=sampling.repetition_penalty,
                eos_token_id=self.tokenizer.eos_id,
                pad_token_id=self.tokenizer.eos_id,
                stopping_criteria=[stop],
                **settings,
            )
        return [_until_eos(row, self.tokenizer.eos_id) for row in out[:, length:].tolist()]


def until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    places = [place for place in (text.find(stop) for stop in stops if stop) if place >= 0]
    return text[: min(places, default=len(text))]


def until_found(tokenizer: ForeignTokenizer, tokens: list[int], stops: Sequence[str]) -> bool:
    """Whether a stop string ends among the last tokens; each byte of it may be one."""
    if not stops:
        return False
    tail = tokens[-(max(len(stop.encode()) for stop in stops) + 4) :]
    text = tokenizer.decode(tail)
    return any(stop in text for stop in stops if stop)


def _until_eos(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


def _scores(logits: torch.Tensor, labels: np.ndarray) -> Scores:
    """Of one row, `[T, N]` and `[T]`."""
    asked = labels != NO_TARGET
    wanted = torch.from_numpy(labels[asked]).to(logits.device)
    chosen = logits[torch.from_numpy(asked).to(logits.device)].float()
    nll, hit = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool)
    nll[asked] = torch.nn.functional.cross_entropy(chosen, wanted, reduction="none").double().cpu().numpy()
    hit[asked] = (chosen.argmax(dim=-1) == wanted).cpu().numpy()
    return Scores(nll, hit)
