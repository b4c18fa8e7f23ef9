"""Generation for every mixer of the registry: however a prompt is read, and whoever stands beside it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import eval.generate
from eval.generate import continuations, generate, prefill, state_bytes
from eval.sampling import Sampling
from models.config import ModelConfig
from models.lm import LM
from models.mixers import MIXERS, MixerConfigs
from models.mlp import MLPConfig
from tests.models.test_mixers import EXAMPLES, WIDTH

PROMPTS = [[2, 7, 9, 11, 4, 5, 8, 30, 31, 1, 6], [2], [2, 40, 41], [2, 1, 1, 1, 40, 39, 38]]
CONSTANT = [kind for kind in MIXERS if kind != "attention"]


def stack(*kinds: str, dtype: torch.dtype = torch.float64) -> LM:
    """Weights far from their initial values, so that every bias and tap counts."""
    config = ModelConfig(
        vocab_size=43,
        width=WIDTH,
        layers=kinds,
        mixers=MixerConfigs(**{kind: EXAMPLES[kind] for kind in set(kinds)}),
        mlp=MLPConfig(width=2 * WIDTH),
    )
    model = LM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


@pytest.fixture(scope="module", params=[*MIXERS, "all"])
def model(request: pytest.FixtureRequest) -> LM:
    return stack(*MIXERS) if request.param == "all" else stack(request.param, request.param)


@torch.no_grad()
def logits_by(model: LM, input_ids: Tensor, positions: Tensor, sizes: Sequence[int]) -> Tensor:
    state, pieces = model.init_state(len(input_ids)), []
    for ids, places in zip(input_ids.split(list(sizes), dim=1), positions.split(list(sizes), dim=1), strict=True):
        logits, state = model(ids, places.contiguous(), state=state)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("sizes", [(33,), (1,) * 33, (5,) * 6 + (3,), (20, 1, 1, 11)], ids=str)
def test_every_way_to_read_a_prompt_is_the_same(model: LM, sizes: tuple[int, ...]) -> None:
    """Whole, step by step, in chunks, and mixed; left padding before the second row's prompt."""
    input_ids = torch.randint(0, 43, (2, 33), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.arange(33), torch.cat([torch.zeros(8, dtype=torch.int64), torch.arange(25)])])
    with torch.no_grad():
        whole, _ = model(input_ids, positions)
    torch.testing.assert_close(logits_by(model, input_ids, positions, sizes), whole, rtol=1e-9, atol=1e-10)


def test_rows_of_a_ragged_batch_are_single_rows(model: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, in chunks shorter than the padding, against each prompt alone and read whole."""
    sampling = Sampling(max_tokens=9, temperature=0)
    alone = [generate(model, [prompt], sampling)[0] for prompt in PROMPTS]
    assert len(set(map(tuple, alone))) > 1
    monkeypatch.setattr(eval.generate, "PREFILL_CHUNK", 3)
    assert generate(model, PROMPTS, sampling) == alone


def test_padding_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above, as classes elsewhere have it: padding that counts as the beginning of the row."""
    model = stack("gated_deltanet", "rglru")

    def leaking(model: LM, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, object]:
        return prefill(model, input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids).contiguous())

    alone = [generate(model, [prompt], Sampling(max_tokens=9, temperature=0))[0] for prompt in PROMPTS]
    monkeypatch.setattr(eval.generate, "prefill", leaking)
    assert generate(model, PROMPTS, Sampling(max_tokens=9, temperature=0)) != alone


def bytes_after(model: LM, length: int) -> int:
    """Of the state, once `length` tokens have been read, the last ones a step each."""
    input_ids = torch.randint(0, 43, (2, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).expand(2, -1).contiguous()
    with torch.no_grad():
        _, state = prefill(model, input_ids[:, :-4], positions[:, :-4])
        for t in range(length - 4, length):
            _, state = model.hidden(input_ids[:, t : t + 1], positions[:, t : t + 1], state)
    return state_bytes(state)


@pytest.mark.parametrize("kind", CONSTANT)
def test_the_state_does_not_grow_with_the_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval.generate, "PREFILL_CHUNK", 64)
    model = stack(kind, dtype=torch.float32)
    assert bytes_after(model, 2000) == bytes_after(model, 40) > 0


def test_the_state_of_full_attention_grows() -> None:
    """What the test above would find."""
    model = stack("attention", dtype=torch.float32)
    assert bytes_after(model, 160) == 4 * bytes_after(model, 40)


def test_the_caller_may_stop_at_any_step(model: LM) -> None:
    steps = continuations(model, PROMPTS, Sampling(max_tokens=1000, temperature=0))
    assert len(next(steps)) == len(PROMPTS)
    steps.close()
