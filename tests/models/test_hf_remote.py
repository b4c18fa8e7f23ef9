"""RondoForCausalLM keeps transformers' conventions and is the LM it was made from, padding or not."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from eval.generate import generate
from eval.sampling import Sampling
from models.config import ModelConfig
from models.hf.formats import KEPT_IN_FP32, TokenIds
from models.hf.remote import PREFIX, RONDO
from models.hf.templates.configuration_rondo import RondoConfig
from models.hf.templates.modeling_rondo import RondoForCausalLM
from models.hf.templates.recurrent_cache import RecurrentCache
from models.lm import LM
from models.mixers import MIXERS
from models.norm import RMSNorm
from tests.models.griffin import griffin
from tests.models.stacks import STACKS, stack_config

LENGTHS = (3, 11, 1, 8)
WHOLE = max(LENGTHS)

every_stack = pytest.mark.parametrize("name", STACKS)
every_mixer = pytest.mark.parametrize("name", MIXERS)


def wrapped(lm: LM) -> RondoForCausalLM:
    """With the parameters of `lm` themselves."""
    model = RondoForCausalLM(RondoConfig(**RONDO.config_json(lm.config, TokenIds(0, 1, 2)))).eval()
    model.generation_config.eos_token_id = None
    model.model.load_state_dict(lm.state_dict())
    return model


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[LM, RondoForCausalLM]]:
    models: dict[str, tuple[LM, RondoForCausalLM]] = {}
    for name, layers in STACKS.items():
        lm = griffin(stack_config(layers, tie_embeddings=name != "attention")).eval()
        models[name] = lm, wrapped(lm)
    return models


MOST = [name if name in ("all", "attention") else pytest.param(name, marks=pytest.mark.slow) for name in STACKS]
"""Every mixer stands in the stack of all; attention alone has a head of its own and a state that grows."""


@pytest.fixture(params=MOST)
def pair(request: pytest.FixtureRequest, made: dict[str, tuple[LM, RondoForCausalLM]]) -> tuple[LM, RondoForCausalLM]:
    return made[request.param]


@pytest.fixture
def exact(pair: tuple[LM, RondoForCausalLM]) -> RondoForCausalLM:
    """In float64: in fp32 a delta rule of few features rounds by as much as a small leak would show."""
    return copy.deepcopy(pair[1]).double()


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 61, (1, length), generator=generator) for length in LENGTHS]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, `[B, T]`."""
    ids, mask = torch.zeros(2, len(rows), WHOLE, dtype=torch.int64).unbind()
    for i, row in enumerate(rows):
        place = slice(WHOLE - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask


def inside(x: Tensor, i: int, side: str) -> Tensor:
    """What lies at row i's own tokens."""
    return x[i, WHOLE - LENGTHS[i] :] if side == "left" else x[i, : LENGTHS[i]]


@torch.no_grad()
def test_logits_are_the_models(pair: tuple[LM, RondoForCausalLM]) -> None:
    lm, model = pair
    ids = torch.randint(61, (2, 70), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(70).expand_as(ids)
    wanted = lm(ids, positions)[0]
    rounding = (wanted - copy.deepcopy(lm).double()(ids, positions)[0]).abs().max()

    def differ(found: Tensor, expected: Tensor) -> bool:
        """By more than fp32 does, in which the order of sums depends on threads and on how many rows a product has."""
        return bool((found - expected).abs().max() > 4 * rounding)

    assert 0 < rounding < 1e-4 * wanted.abs().max()
    assert not differ(model(ids).logits, wanted)
    assert model(ids, use_cache=False).past_key_values is None
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == len(lm.config.layers) + 1
    assert torch.equal(hidden[0], lm.embed(ids))
    last, kept = model(ids, logits_to_keep=3).logits, torch.tensor([5, 9])
    assert not differ(last, wanted[:, -3:])
    assert differ(last, wanted[:, -4:-1])
    assert not differ(model(ids, logits_to_keep=kept).logits, wanted[:, kept])


@torch.no_grad()
def test_packed_documents_are_told_by_position_ids(exact: RondoForCausalLM) -> None:
    rows = prompts()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    found = exact(torch.cat(rows, dim=1), position_ids=positions).logits[0]
    wanted = torch.cat([exact(row).logits[0] for row in rows])
    assert (found - wanted).abs().max() <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_no_token(exact: RondoForCausalLM, side: str) -> None:
    rows = prompts()
    ids, mask = padded(rows, side)
    logits = exact(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        wanted, alone = exact(row).logits[0], slice(i, i + 1)
        assert (inside(logits, i, side) - wanted).abs().max() <= 1e-12
        single = exact(ids[alone], attention_mask=mask[alone]).logits.expand(len(rows), -1, -1)
        assert (inside(single, i, side) - wanted).abs().max() <= 1e-12


@torch.no_grad()
def test_padding_leaks_where_it_counts_as_tokens(pair: tuple[LM, RondoForCausalLM]) -> None:
    """Mutant: what a wrapper does that hands on positions and masks keys alone."""
    _, model = pair
    rows = prompts()
    ids, _ = padded(rows, "left")
    logits = model(ids).logits
    assert (inside(logits, 0, "left") - model(rows[0]).logits[0]).abs().max() > 1e-3


@torch.no_grad()
def test_batches_generate_what_rows_do(pair: tuple[LM, RondoForCausalLM]) -> None:
    """Greedily from a left-padded batch, in chunks of the prompt too: what Rondo itself generates from each prompt."""
    lm, model = pair
    rows = prompts()
    ids, mask = padded(rows, "left")
    wanted = generate(lm, [row[0].tolist() for row in rows], Sampling(max_tokens=8, temperature=0.0))
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    for how in ({}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        assert model.generate(ids, **settings, **how)[:, WHOLE:].tolist() == wanted


@torch.no_grad()
def test_chunks_and_steps_are_the_whole(exact: RondoForCausalLM) -> None:
    ids, mask = padded(prompts(), "left")
    whole = exact(ids, attention_mask=mask).logits
    for sizes in ([4, 4, 3], [1] * WHOLE):
        cache, found, start = RecurrentCache(), [], 0
        for size in sizes:
            part = slice(start, start + size)
            out = exact(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache)
            assert out.past_key_values is cache
            found.append(out.logits)
            start += size
        assert cache.get_seq_length() == WHOLE
        assert (inside(torch.cat(found, 1), 0, "left") - inside(whole, 0, "left")).abs().max() <= 1e-12
        assert (torch.cat(found, 1)[1] - whole[1]).abs().max() <= 1e-12


@torch.no_grad()
def test_a_mask_may_cover_the_new_tokens_alone_or_be_left_out(made: dict[str, tuple[LM, RondoForCausalLM]]) -> None:
    _, model = made["all"]
    ids, mask = padded(prompts(), "left")
    token = torch.full((4, 1), 7)
    logits = []
    for later in ({"attention_mask": torch.cat([mask, torch.ones_like(token)], 1)}, {"attention_mask": token}, {}):
        cache = model(ids, attention_mask=mask).past_key_values
        logits.append(model(token, past_key_values=cache, **later).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@torch.no_grad()
def test_beams_carry_their_states(
    pair: tuple[LM, RondoForCausalLM], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    _, model = pair
    ids, mask = padded(prompts(), "left")
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    wanted = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), wanted)
    if "all" in request.node.callspec.id:  # mutant: states that stay where they are
        monkeypatch.setattr(RecurrentCache, "reorder_cache", lambda self, beam_idx: None)
        assert not torch.equal(model.generate(ids, **settings), wanted)


@torch.no_grad()
def test_the_cache_does_not_grow(made: dict[str, tuple[LM, RondoForCausalLM]]) -> None:
    for name in set(MIXERS) - {"attention"}:
        cache = RecurrentCache()
        sizes = set()
        for _ in range(3):
            made[name][1](torch.ones(1, 16, dtype=torch.int64), past_key_values=cache)
            leaves = torch.utils._pytree.tree_leaves(cache.state)
            sizes.add(sum(leaf.numel() for leaf in leaves))
        assert len(sizes) == 1, name


def test_rows_of_the_cache() -> None:
    cache = RecurrentCache()
    cache.batch_repeat_interleave(2)  # nothing is known yet
    cache.state, cache.next_positions = ((torch.arange(3.0), torch.arange(6.0).view(3, 2)), ()), torch.tensor([4, 5, 6])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 5]))
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert cache.state is not None
    assert cache.state[0][0].tolist() == [2.0, 2.0, 0.0]
    assert cache.state[0][1].tolist() == [[4.0, 5.0], [4.0, 5.0], [0.0, 1.0]]
    assert cache.next_positions.tolist() == [6, 6, 4]
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.crop(2)


def gradients(model: RondoForCausalLM, **inputs: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(pair: tuple[LM, RondoForCausalLM], side: str) -> None:
    """Labels are the unshifted ids; each row's first token is no target, whatever padding stands before it."""
    lm, model = pair
    rows = prompts()
    ids, mask = padded(rows, side)
    targets = sum(LENGTHS) - len(LENGTHS)
    labels = ids.masked_fill(mask == 0, -100)
    loss, found = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    lm.zero_grad()
    total = torch.zeros(())
    for row in rows:
        nll, _ = lm(row[:, :-1], torch.arange(row.shape[1] - 1)[None], row[:, 1:]) if row.shape[1] > 1 else (total, 0)
        total = total + nll.sum() if row.shape[1] > 1 else total
    (total / targets).backward()
    assert loss == pytest.approx(total.item() / targets, rel=1e-5)
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None
        assert (found[PREFIX + name] - parameter.grad).abs().max() <= 1e-5 * max(1.0, parameter.grad.abs().max()), name
    whole = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(2 * targets)).loss
    assert whole.item() == pytest.approx(loss / 2, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(pair: tuple[LM, RondoForCausalLM]) -> None:
    _, model = pair
    ids, mask = padded(prompts(), "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    calls: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in model.model.blocks]
    model.train()
    try:
        _, wanted = gradients(model, **inputs)
        once = len(calls)
        model.activation_checkpointing_enable()
        _, found = gradients(model, **inputs)
        assert len(calls) - once == 2 * once
    finally:
        model.activation_checkpointing_disable()
        model.eval()
        for hook in hooks:
            hook.remove()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, made: dict[str, tuple[LM, RondoForCausalLM]]) -> Path:
    """The mixed stack's weights and configuration, without the files of code."""
    directory = tmp_path_factory.mktemp("stored")
    disable_progress_bar()
    made["all"][1].save_pretrained(directory)
    return directory


def test_saved_and_loaded_it_is_the_same(stored: Path, made: dict[str, tuple[LM, RondoForCausalLM]]) -> None:
    lm, _ = made["all"]
    assert load_file(stored / "model.safetensors").keys() == {PREFIX + name for name, _ in lm.named_parameters()}
    loaded = RondoForCausalLM.from_pretrained(stored)
    for name, parameter in lm.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name
    assert loaded.model.head.weight is loaded.model.embed.weight


def test_an_untied_head_is_stored_by_itself(tmp_path: Path, made: dict[str, tuple[LM, RondoForCausalLM]]) -> None:
    lm, model = made["attention"]
    model.save_pretrained(tmp_path)
    loaded = RondoForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(lm.head.weight, lm.embed.weight)
    assert torch.equal(loaded.model.head.weight, lm.head.weight)


@torch.no_grad()
def test_in_bf16_decays_and_norms_stay_fp32(stored: Path, made: dict[str, tuple[LM, RondoForCausalLM]]) -> None:
    lm, _ = made["all"]
    loaded = RondoForCausalLM.from_pretrained(stored, dtype=torch.bfloat16).eval()
    norms = {f"{name}.weight" for name, module in lm.named_modules() if isinstance(module, RMSNorm)}
    for name, parameter in loaded.model.named_parameters():
        precise = name in norms or name.endswith((*KEPT_IN_FP32, "residual_scale"))
        assert parameter.dtype == (torch.float32 if precise else torch.bfloat16), name
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    wanted = lm(ids, torch.arange(20).expand_as(ids))[0]
    found = loaded(ids).logits
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.2
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 24)


def test_what_no_file_gives_starts_as_in_training(stored: Path, tmp_path: Path, made: dict[str, Any]) -> None:
    lm: LM = made["all"][0]
    fresh = LM(lm.config, seed=0)
    kinds = lm.config.layers
    lost = [f"blocks.{kinds.index('rglru')}.mixer.decay_param", f"blocks.{kinds.index('hgrn2')}.mlp_norm.weight"]
    weights = load_file(stored / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n.removeprefix(PREFIX) not in lost}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((stored / "config.json").read_bytes())
    loaded = RondoForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, (fresh if name in lost else lm).get_parameter(name)), name
    blank = RondoForCausalLM(loaded.config)
    assert all(torch.equal(p, blank.model.get_parameter(name)) for name, p in fresh.named_parameters())


def test_wrong_inputs_are_refused(made: dict[str, tuple[LM, RondoForCausalLM]]) -> None:
    _, model = made["all"]
    rows = prompts()
    ids, mask = padded(rows, "left")
    holed = mask.clone()
    holed[1, 4] = 0
    with pytest.raises(ValueError, match="padding between tokens of a document"):
        model(ids, attention_mask=holed)
    with pytest.raises(ValueError, match=r"attention_mask: \[4, 5\]; must be \[B, T\] = \[4, 11\]"):
        model(ids, attention_mask=mask[:, :5])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 16))
    ids, mask = padded(rows, "right")
    token = torch.full((4, 1), 7)
    after = torch.cat([mask, torch.ones_like(token)], 1)
    cache = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="pad on the left"):
        model(token, attention_mask=after, past_key_values=cache)
    cache = RecurrentCache()
    for t in range(WHOLE):
        if t > min(LENGTHS):
            break
        model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
    with pytest.raises(ValueError, match="pad on the left"):
        model(token, attention_mask=torch.ones(4, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(rows[0], assistant_model=model, max_new_tokens=2)


def config_json(config: ModelConfig) -> dict[str, Any]:
    return json.loads(json.dumps(RONDO.config_json(config, TokenIds())))


@every_stack
def test_a_configuration_comes_back(name: str) -> None:
    config = stack_config(STACKS[name], logit_soft_cap=None, post_norm=(STACKS[name][0],))
    assert RONDO.model_config is not None
    assert RONDO.model_config(config_json(config)) == config
    theirs = RondoConfig(**config_json(config))
    assert (theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers) == (61, 16, len(STACKS[name]))
    assert theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": None}, "config.json: model: None; must be a mapping"),
        ({"model": {"widht": 8}}, "config.json: model: widht: 8; no such setting, choose from vocab_size, width"),
        ({"model": {"width": 0}}, "config.json: model: width: 0; must be at least 1"),
        ({"model": {"mlp": {}}}, "config.json: model: mlp.width: missing; add it"),
        ({"model": {"mixers": {"rglru": {"width": 16, "gate_blocks": 3}}}}, "multiple of gate_blocks"),
        ({"model": {"width": "16"}}, "config.json: model"),
    ],
)
def test_a_wrong_configuration_is_refused(change: dict[str, Any], complaint: str) -> None:
    values = config_json(stack_config(STACKS["rglru"]))
    model = change["model"]
    values["model"] = None if model is None else values["model"] | model
    assert RONDO.model_config is not None
    with pytest.raises(ValueError, match=complaint.replace(".", r"\.")):
        RONDO.model_config(values)
