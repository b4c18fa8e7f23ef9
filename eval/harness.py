"""lm-evaluation-harness over any `EvalModel`: its requests answered."""

from collections.abc import Callable, Sequence
from typing import Any

from eval.model import EvalModel, Row, continuation, encode_pair
from eval.sampling import Sampling

MAX_TOKENS = 256
"""Of a continuation whose task names no limit, as in lm-eval's own models."""

TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call that limit; the first one given counts."""

_SETTINGS = {"until", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed", *TOKEN_LIMITS}

REQUESTS_AT_ONCE = 1024
"""Requests between two entries of the cache, and so the most that are lost when a run is killed."""


class _Answers:
    """What lm-eval's `LM` asks for, answered by `self.model`. `lm_eval_model` makes the class of both."""

    def __init__(self, model: EvalModel) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log likelihood, whether greedy decoding would give it) of each (context, continuation)."""
        tokenizer = self.model.tokenizer
        rows = [continuation(*encode_pair(tokenizer, *request.args)) for request in requests]

        def answers(part: list[Row]) -> list[tuple[float, bool]]:
            scores = self.model.score(part)
            return [(score.log_likelihood, bool(score.hit[row.labels >= 0].all())) for row, score in zip(part, scores)]

        return self._in_parts("loglikelihood", requests, rows, answers, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of each text as a document, BOS before it.

        A model without a limit reads it in one pass through its state. One with a limit takes it window by window: the
        first is full, each later one predicts as much as fits after the token before it.
        """
        tokenizer = self.model.tokenizer
        documents = [self._document(tokenizer.encode(request.args[0])) for request in requests]

        def answers(part: list[list[Row]]) -> list[float]:
            scores = iter(self.model.score([row for rows in part for row in rows]))
            return [sum((next(scores).log_likelihood for _ in rows), 0.0) for rows in part]

        return self._in_parts("loglikelihood_rolling", requests, documents, answers, disable_tqdm)

    def _document(self, tokens: list[int]) -> list[Row]:
        if not tokens:
            return []
        row = continuation([self.model.tokenizer.bos_id], tokens)
        if self.model.longest is None or len(row.input_ids) <= self.model.longest:
            return [row]
        return rolling_windows(row, self.model.longest)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to a string of `until`, EOS, or so many tokens."""
        results: dict[int, str] = {}
        by_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        tokenizer = self.model.tokenizer
        for members in by_settings.values():
            sampling, stops = read_settings(requests[members[0]].args[1])
            prompts = [[tokenizer.bos_id, *tokenizer.encode(requests[i].args[0])] for i in members]

            def answers(part: list[list[int]], sampling: Sampling = sampling, stops: list[str] = stops) -> list[str]:
                return self.model.generate_texts(part, sampling, stops)

            same = [requests[i] for i in members]
            results |= zip(members, self._in_parts("generate_until", same, prompts, answers, disable_tqdm))
        return [results[i] for i in range(len(requests))]

    def _in_parts(
        self,
        kind: str,
        requests: Sequence[Any],
        asked: list[Any],
        answers: Callable[[list[Any]], list[Any]],
        quiet: bool,
    ) -> list[Any]:
        """`answers(asked)`, part by part, with a progress bar, each part kept in the cache if there is one."""
        from tqdm import tqdm

        results: list[Any] = []
        with tqdm(total=len(asked), desc=kind, unit="request", disable=quiet or None) as bar:
            for start in range(0, len(asked), REQUESTS_AT_ONCE):
                part = answers(asked[start : start + REQUESTS_AT_ONCE])
                for request, answer in zip(requests[start : start + REQUESTS_AT_ONCE], part, strict=True):
                    self.cache_hook.add_partial(kind, request.args, answer)  # type: ignore[attr-defined]
                results += part
                bar.update(len(part))
        return results


def lm_eval_model(model: EvalModel) -> Any:
    """`model` as a subclass of lm-eval's `LM`, which is imported no sooner than it is needed."""
    from lm_eval.api.model import LM

    return type("RondoLM", (_Answers, LM), {})(model)


def rolling_windows(row: Row, longest: int) -> list[Row]:
    """A document as rows of `longest` tokens that ask for each of its tokens once, the last with all the context it
    can have."""
    rows = [Row(row.input_ids[:longest], row.labels[:longest])]
    for start in range(longest, len(row.labels), longest):
        stop = min(start + longest, len(row.labels))
        labels = row.labels[stop - longest : stop].copy()
        labels[: start - (stop - longest)] = -100
        rows.append(Row(row.input_ids[stop - longest : stop], labels))
    return rows


def read_settings(settings: dict[str, Any]) -> tuple[Sampling, list[str]]:
    """A task's `generation_kwargs` as sampling settings and stop strings.

    Raises:
        ValueError: it asks for something else, such as beam search.
    """
    given = dict(settings)
    if given.pop("num_beams", 1) != 1 or given.keys() - _SETTINGS:
        unknown = sorted(settings.keys() - _SETTINGS)
        raise ValueError(f"generation_kwargs: {', '.join(unknown)}; known are {', '.join(sorted(_SETTINGS))}")
    until = given.get("until") or []
    limits = [int(given[key]) for key in TOKEN_LIMITS if given.get(key) is not None]
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample") and not temperature:
        temperature = 1.0
    sampling = Sampling(
        max_tokens=limits[0] if limits else MAX_TOKENS,
        temperature=0.0 if given.get("do_sample") is False else temperature,
        top_k=given.get("top_k") or None,
        top_p=float(given.get("top_p") or 1.0),
        repetition_penalty=float(given.get("repetition_penalty") or 1.0),
        seed=int(given.get("seed") or 0),
    )
    return sampling, [until] if isinstance(until, str) else list(until)
