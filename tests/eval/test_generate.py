"""Generation through the state against the full forward, and what its settings promise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eval.generate
from data.tokenizer import Tokenizer
from eval.generate import generate, generate_texts, main, sample_text
from eval.sampling import Sampling, choose, penalized
from eval.stops import TextStream
from models.lm import LM
from tests.models.griffin import griffin, griffin_config, padded_griffin, write_run

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tokenizer.model"
PROMPTS = [[2, 7, 9, 11, 4, 5, 8, 30, 31], [2], [2, 40, 41], [2, 1, 1, 1, 60, 59, 58]]


@pytest.fixture(scope="module")
def model() -> LM:
    return griffin().eval()


@pytest.fixture(scope="module")
def speaker() -> LM:
    """As many tokens as the tokenizer has."""
    return griffin(griffin_config(vocab_size=Tokenizer(TOKENIZER).vocab_size)).eval()


@pytest.fixture(scope="module")
def run(speaker: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", speaker, TOKENIZER)


@torch.no_grad()
def greedy_by_full_forward(model: LM, prompt: list[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        tokens = torch.tensor([ids])
        ids.append(int(model(tokens, torch.arange(len(ids)).unsqueeze(0))[0][0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_full_forward(model: LM) -> None:
    """Prompts of unequal length in one batch, continued over several windows of the attention."""
    expected = [greedy_by_full_forward(model, prompt, 15) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS), "rows that all say the same prove little"
    assert generate(model, PROMPTS, Sampling(max_tokens=15, temperature=0)) == expected


def test_a_long_prompt_is_read_in_chunks(model: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(model, PROMPTS, Sampling(max_tokens=8, temperature=0))
    monkeypatch.setattr(eval.generate, "PREFILL_CHUNK", 4)
    assert generate(model, PROMPTS, Sampling(max_tokens=8, temperature=0)) == whole


def test_eos_ends_a_row_and_not_its_neighbours(model: LM) -> None:
    free = generate(model, PROMPTS, Sampling(max_tokens=12, temperature=0))
    eos = free[0][3]
    stopped = generate(model, PROMPTS, Sampling(max_tokens=12, temperature=0), eos_id=eos)
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in free]
    assert len(stopped[0]) <= 3
    assert any(len(row) == 12 for row in stopped)


def test_sampling_is_reproducible_by_seed_alone(model: LM) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, PROMPTS, Sampling(max_tokens=12, seed=5))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is training's"
    torch.manual_seed(2)
    assert generate(model, PROMPTS, Sampling(max_tokens=12, seed=5)) == first
    assert generate(model, PROMPTS, Sampling(max_tokens=12, seed=6)) != first


def test_a_row_does_not_depend_on_its_neighbours(model: LM) -> None:
    together = generate(model, PROMPTS[1:], Sampling(max_tokens=12, seed=5))
    assert generate(model, PROMPTS[1:2], Sampling(max_tokens=12, seed=5)) == together[:1]


def frequencies(logits: Tensor, draws: int = 4000, **settings: Any) -> Tensor:
    """How often each token comes out over evenly spaced draws."""
    draw = (torch.arange(draws) + 0.5) / draws
    tokens = choose(logits.expand(draws, -1), draw, Sampling(max_tokens=1, **settings))
    return torch.bincount(tokens, minlength=len(logits)) / draws


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probabilities.log() + 3.0
    assert torch.allclose(frequencies(logits), probabilities, atol=1e-3)
    sharper = probabilities**2 / (probabilities**2).sum()
    assert torch.allclose(frequencies(logits, temperature=0.5), sharper, atol=1e-3)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.01, [0, 1, 0, 0]), (0.45, [0, 1, 0, 0]), (0.6, [0, 0.625, 0, 0.375]), (0.94, [0, 10 / 19, 3 / 19, 6 / 19])],
)
def test_top_p_keeps_the_fewest_tokens_that_hold_its_share(top_p: float, expected: list[float]) -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    assert torch.allclose(frequencies(logits, top_p=top_p), torch.tensor(expected, dtype=torch.float32), atol=1e-3)


def test_the_extreme_draws_are_tokens() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]]).expand(2, -1)
    assert choose(logits, torch.tensor([0.0, 1.0]), Sampling(max_tokens=1)).tolist() == [2, 0]


def test_top_k_comes_before_top_p() -> None:
    """The share that top_p keeps is one of what top_k left."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    assert torch.allclose(frequencies(logits, top_k=2), torch.tensor([0, 0.625, 0, 0.375]), atol=1e-3)
    assert torch.allclose(frequencies(logits, top_k=2, top_p=0.6), torch.tensor([0, 1.0, 0, 0]), atol=1e-3)
    assert torch.allclose(frequencies(logits, top_k=9), logits.exp(), atol=1e-3)


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert penalized(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_a_strong_penalty_never_repeats(model: LM) -> None:
    """Also not what the prompt holds; without one the greedy continuations do."""
    for penalty, repeats in ((1.0, True), (1e9, False)):
        sampling = Sampling(max_tokens=20, temperature=0, repetition_penalty=penalty)
        rows = [prompt + row for prompt, row in zip(PROMPTS[:1], generate(model, PROMPTS[:1], sampling))]
        assert any(len(set(row)) < len(row) for row in rows) == repeats


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range(key: str, value: float) -> None:
    settings: Any = {"max_tokens": 1} | {key: value}
    with pytest.raises(ValueError, match=f"^{key}: "):
        Sampling(**settings)


def test_prompts_must_hold_tokens(model: LM) -> None:
    with pytest.raises(ValueError, match=r"^prompts\[1\]: empty"):
        generate(model, [[2], []], Sampling(max_tokens=1))
    with pytest.raises(ValueError, match=r"^prompts\[1\]: token 61; the model has tokens 0 to 60"):
        generate(model, [[2], [3, 61]], Sampling(max_tokens=1))
    with pytest.raises(ValueError, match=r"^prompts: none"):
        generate(model, [], Sampling(max_tokens=1))


def test_texts_begin_with_their_prompts(speaker: LM) -> None:
    prompts = ["def  f(x):\n\t", "", "é"]
    texts = sample_text(speaker, Tokenizer(TOKENIZER), prompts, max_tokens=6, seed=3)
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(texts, prompts, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_padded_vocabulary_is_not_spoken(temperature: float) -> None:
    """The rows beyond the tokenizer are the likeliest everywhere: whatever a hidden state is, one of a pair scores."""
    tokenizer = Tokenizer(TOKENIZER)
    model = padded_griffin(tokenizer.vocab_size, 64)
    free = generate(model, PROMPTS, Sampling(max_tokens=8, temperature=temperature, seed=1))
    assert max(max(row) for row in free) >= tokenizer.vocab_size
    bounded = generate(
        model, PROMPTS, Sampling(max_tokens=8, temperature=temperature, seed=1), vocab_size=tokenizer.vocab_size
    )
    assert max(max(row) for row in bounded) < tokenizer.vocab_size
    texts = sample_text(model, tokenizer, ["def ", ""], max_tokens=8, temperature=temperature, seed=1)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, ["def ", ""], strict=True))


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:3", "meta"])
def test_a_device_that_is_not_here(
    run: Path, device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        main([str(run), "--device", device])
    assert exit_info.value.code == 2
    assert f"argument --device: value '{device}'; this machine has cpu; choose" in capsys.readouterr().err


def test_rows_of_a_later_batch_draw_their_own_numbers(model: LM) -> None:
    together = generate(model, PROMPTS, Sampling(max_tokens=12, seed=5))
    assert generate(model, PROMPTS[2:], Sampling(max_tokens=12, seed=5), rows=[2, 3]) == together[2:]


def test_text_comes_in_whole_characters_and_ends_before_a_stop() -> None:
    tokenizer = Tokenizer(TOKENIZER)
    text = "naïve 😀 text, then def the end"
    tokens = [token for character in text for token in tokenizer.encode(character)]
    assert len(tokens) > len(text), "a character of several tokens"
    for stops, expected in (
        ((), text),
        (("def", "text, then defeat"), "naïve 😀 text, then "),
        (("end.", "x, y"), text),
    ):
        stream = TextStream(tokenizer.decode, stops)
        pieces = [stream.feed(token) for token in tokens]
        assert "".join([*pieces, stream.close()]) == expected
        assert stream.stopped == (expected != text)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert sum(map(bool, pieces)) > 5, "it comes piece by piece"


def test_a_text_that_might_become_a_stop_is_held_back() -> None:
    stream = TextStream(lambda tokens: "".join(map(chr, tokens)), ["abc"])
    assert [stream.feed(ord(character)) for character in "xababd"] == ["x", "", "", "ab", "", "abd"]
    assert stream.feed(ord("a")) + stream.close() == "a"


def test_stop_strings_end_rows_alone(speaker: LM) -> None:
    """Each row ends at its own place, and what it says before is what it says without a stop."""
    tokenizer = Tokenizer(TOKENIZER)
    sampling = Sampling(max_tokens=12, seed=4)
    free = generate_texts(speaker, tokenizer, PROMPTS, sampling)
    stop = free[0][5:8]
    assert stop
    stopped = generate_texts(speaker, tokenizer, PROMPTS, sampling, stops=[stop])
    assert stopped == [text.partition(stop)[0] for text in free]
    assert len(stopped[0]) <= 5 < len(free[0])


def test_command_streams_one_text(run: Path, speaker: LM, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--max-tokens", "9", "--device", "cpu", "--top-k", "50", "--repetition-penalty", "1.2", "--seed", "2"]
    assert main([str(run), "--prompt", "def ", *settings]) == 0
    sampling = Sampling(max_tokens=9, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=2)
    tokenizer = Tokenizer(TOKENIZER)
    prompt = [tokenizer.bos_id, *tokenizer.encode("def ")]
    (expected,) = generate_texts(speaker, tokenizer, [prompt], sampling)
    assert capsys.readouterr().out == f"def {expected}\n"


def test_command(run: Path, speaker: LM, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "def ", "--prompt", "import", "--max-tokens", "5", "--device", "cpu"]
    assert main([str(run), *arguments, "--greedy"]) == 0
    expected = sample_text(speaker, Tokenizer(TOKENIZER), ["def ", "import"], max_tokens=5, temperature=0)
    assert capsys.readouterr().out == "\n\n".join(expected) + "\n"


def test_bad_usage_and_failure(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([str(run), "--top-p", "1.5"])
    assert exit_info.value.code == 2
    assert "top_p: 1.5" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("eval.generate: ")
    assert error.count("\n") == 1
