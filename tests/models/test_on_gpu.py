"""A training step on a GPU: it never waits for the device, and other lengths or packings compile nothing."""

from collections.abc import Iterator

import pytest
import torch

from models.lm import LM
from ops.impl import IMPLEMENTATIONS
from tests.models.test_mixers import EXAMPLES
from tests.parallel.mixed import EVERY_MIXER, config_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

IMPL = {op: "triton" for op, known in IMPLEMENTATIONS.items() if "triton" in known}


@pytest.fixture
def strict() -> Iterator[None]:
    """What synchronises with the device raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def step(model: LM, optimizer: torch.optim.Optimizer, positions: torch.Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        nll, log_z = model(positions % 61, positions, positions % 61)
    (nll.mean() + 1e-4 * log_z.square().mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad()


def packed(length: int, document: int) -> torch.Tensor:
    """Two rows of documents of so many tokens."""
    return (torch.arange(length, device="cuda") % document).repeat(2, 1)


def built() -> tuple[LM, torch.optim.Optimizer]:
    model = LM(config_of(EVERY_MIXER, changes={"model": {"impl": IMPL}}), device_type="cuda").cuda()
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def test_a_step_does_not_wait_for_the_device(strict: None) -> None:
    model, optimizer = built()
    batches = [packed(256, document) for document in (256, 100, 7)]
    step(model, optimizer, batches[0])  # compiles, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for positions in batches:
        step(model, optimizer, positions)


def test_other_lengths_and_packings_compile_nothing() -> None:
    import triton

    model, optimizer = built()
    for length in (1, 64, 100, 256):  # Triton itself tells 1, multiples of 16 and others apart
        step(model, optimizer, packed(length, 50))
    compiled: list[str] = []
    kept = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(str(what["fn"]))
    try:
        for length, document in ((128, 128), (192, 3), (257, 90), (1024, 512), (4096, 4096)):
            step(model, optimizer, packed(length, document))
    finally:
        triton.knobs.runtime.jit_post_compile_hook = kept
    assert not compiled


def test_every_mixer_is_in_the_stack() -> None:
    assert set(EVERY_MIXER) == set(EXAMPLES)
