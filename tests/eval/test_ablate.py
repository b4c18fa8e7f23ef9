"""Without its state, each token of a recurrent layer stands alone, and nothing else changes."""

import torch

from configs.schema import load_config
from eval.ablate import without_recurrent_state
from models.lm import LM


def test_recurrent_layers_see_single_tokens_inside_and_recover_outside() -> None:
    run = load_config("configs/demo.yaml", ["model.layers=[rglru, rglru]", "model.width=32", "model.vocab_size=50"])
    model = LM(run.model)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, -1)
    whole, _ = model(ids, positions)
    with without_recurrent_state(model):
        alone, _ = model(ids, positions)
        changed = ids.clone()
        changed[:, :-1] = (changed[:, :-1] + 1) % 50
        other_past, _ = model(changed, positions)
    again, _ = model(ids, positions)
    torch.testing.assert_close(alone[:, -1], other_past[:, -1])
    torch.testing.assert_close(alone[:, 0], whole[:, 0])
    assert (alone[:, -1] - whole[:, -1]).abs().max() > 1e-2
    assert torch.equal(again, whole)


def test_attention_keeps_its_past() -> None:
    run = load_config("configs/demo.yaml", ["model.layers=[local_attention]", "model.width=32", "model.vocab_size=50"])
    model = LM(run.model)
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12)[None]
    whole, _ = model(ids, positions)
    with without_recurrent_state(model):
        inside, _ = model(ids, positions)
    assert torch.equal(whole, inside)
