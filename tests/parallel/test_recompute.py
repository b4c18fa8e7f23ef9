"""Activation checkpointing: the same numbers from less that is kept, in one process and on ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from models.lm import LM
from parallel.config import ParallelConfig
from parallel.grid import Grid
from parallel.recompute import checkpoint_blocks, checkpointed_blocks
from parallel.traffic import Key
from tests.parallel.engines import Split, alone_in_float64, step_in_float64, worst
from tests.parallel.mixed import EVERY_MIXER, alone, batch, config_of, loss_of, together
from tests.parallel.test_partition import assert_equal

NONE = ParallelConfig()
FULL = ParallelConfig(activation_checkpointing="full")
SOME = ParallelConfig(activation_checkpointing="selective", checkpointed_mixers=("hgrn2", "attention"))
SECOND = ParallelConfig(activation_checkpointing="selective", checkpointed_every=2)


def test_which_blocks() -> None:
    found = [checkpointed_blocks(EVERY_MIXER, parallel) for parallel in (NONE, FULL, SOME, SECOND)]
    assert found == [set(), set(range(7)), {1, 5, 6}, {0, 2, 4, 6}]
    with pytest.raises(ValueError, match=r"parallel.checkpointed_mixers: \['hgrn2', 'attention'\]; .* has rglru; corr"):
        checkpointed_blocks(("rglru",), SOME)


BAD: dict[str, dict[str, Any]] = {
    "activation_checkpointing: selective, with": {"activation_checkpointing": "selective"},
    "neither; set or remove": {"activation_checkpointing": "full", "checkpointed_every": 2},
    "selective needs one of the two": {
        "activation_checkpointing": "selective",
        "checkpointed_every": 2,
        "checkpointed_mixers": ("rglru",),
    },
    "checkpointed_every: 0; must be at least 1": {"activation_checkpointing": "selective", "checkpointed_every": 0},
    r"checkpointed_mixers: \['gru'\]; must be among attention": {
        "activation_checkpointing": "selective",
        "checkpointed_mixers": ("gru",),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_selections_that_cannot_be(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**BAD[message])


def run(parallel: ParallelConfig, bf16: bool) -> tuple[list[Tensor], int]:
    """Results and gradients, and the bytes that the forward pass keeps for the backward pass beside weights."""
    model = LM(config_of())
    checkpoint_blocks(model, parallel)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage, which lives as long as the tensor is held here

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    # A checkpointed block keeps its input where no hook sees it.
    inputs = [
        model.blocks[i].register_forward_pre_hook(lambda module, arguments: (keep(arguments[0]), None)[1])
        for i in checkpointed_blocks(EVERY_MIXER, parallel)
    ]
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        nll, log_z = model(*batch())
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert len(inputs) == len(checkpointed_blocks(EVERY_MIXER, parallel))
    loss_of(nll, log_z).backward()
    return [nll.detach(), log_z.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], bytes_kept


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_to_the_bit_from_less(bf16: bool) -> None:
    wanted, most = run(NONE, bf16)
    kept = []
    for parallel in (SECOND, SOME, FULL):
        found, size = run(parallel, bf16)
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
        kept.append(size)
    assert kept[0] < 0.7 * most
    assert kept[1] < most
    assert kept[2] < 0.1 * most
    stream = batch()[0].numel() * 32 * 4
    assert kept[2] >= len(EVERY_MIXER) * stream, "the inputs of all blocks at least"


def on_ranks(grid: Grid) -> list[tuple[Any, Any]]:
    """Over two slices and over two tensor ranks: gradients and what travelled, without and with checkpointing."""
    found = []
    for split in ((2, 1), (1, 2)):
        found.append((together(grid, *split), together(grid, *split, activation_checkpointing="full")))
    return found


def test_ranks_exchange_once_more_what_blocks_send_forward(ranks: Any) -> None:
    wanted = alone(config_of())
    for rank, of_rank in enumerate(ranks(2).run(on_ranks)):
        for (_, once), (found, again) in of_rank:
            assert_equal(found, wanted)
            assert once.keys() == again.keys(), "by the same layers"
            for key, volume in once.items():
                only_back = key.operation == "reduce_scatter" or (key.operation == "send" and rank == 1)
                positions = key.operation == "all_gather" and key.layer == "blocks.6"  # which the layout keeps
                if only_back or positions or not key.layer.startswith("blocks"):
                    assert again[key] == volume, key
                else:
                    assert volume.bytes < again[key].bytes <= 2 * volume.bytes, key
            if (key := Key("blocks.0", "tensor", "all_reduce")) in once:  # sums and gradients of mixer and MLP
                assert (once[key].calls, again[key].calls) == (4, 5), "but not the last sum, which nothing needs"


def staged(grid: Grid, parallel: dict[str, Any]) -> dict[str, Tensor]:
    return step_in_float64(grid, Split(2), {}, parallel=parallel)


def test_stages_of_a_pipeline(ranks: Any) -> None:
    wanted = alone_in_float64(config_of())
    settings = {"activation_checkpointing": "selective", "checkpointed_every": 2}
    found = worst(ranks(2).run(staged, parallel=settings), wanted)
    assert max(found.values()) <= 1e-9
