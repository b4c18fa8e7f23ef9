"""Blocks through torch.compile: what lies between recurrences, convolutions and attention becomes fused kernels.

Blocks of a kind share their graphs, so that compiling takes as long for two of them as for forty. Ops are left as they
are, with all that ranks exchange inside them; so is what a mixer reads of a module that its kind shares, by its number.
"""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.block import Block
from models.lm import LM
from ops import Layout

GRAPHS = 64
"""Of one function, at most; torch's own limit of 8 is less than the kinds of some stacks."""

BACKEND = "inductor"

COMPILERS = {"cpu": ("g++", "clang++", "c++"), "cuda": ("gcc", "clang", "cc")}
"""One of which it calls to build kernels, or what starts them."""


def compile_blocks(model: LM, device_type: str) -> None:
    """Replaces, in place, how the blocks of `model` run where gradients are wanted; parameters and names stay.

    Evaluation and generation run as before, as they would be compiled anew for shapes of their own.

    Args:
        device_type: where it runs; on the meta device nothing does, and nothing is needed.

    Raises:
        ValueError: there is no compiler on this machine.
    """
    wanted = COMPILERS.get(device_type, ())
    if wanted and not any(map(shutil.which, wanted)):
        raise ValueError(
            f"parallel.compile: true; on {device_type} torch.compile needs one of {', '.join(wanted)}, and none is in "
            "PATH; install one, or leave it out"
        )
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run on uncompiled without a word
    module: Any
    for module in model.modules():
        core: Any = getattr(module, "core", None)
        if isinstance(core, nn.Module):
            core.forward = torch.compiler.disable(core.forward)
        if hasattr(module, "read_shared"):
            module.read_shared = torch.compiler.disable(module.read_shared)
    blocks: list[Any] = [block for block in model.blocks if isinstance(block, Block)]  # not those of other stages
    for block in blocks:
        block.forward = partial(_run, block.forward, torch.compile(block.forward, dynamic=False, backend=BACKEND))


def _run(
    plain: Callable[..., Any], compiled: Callable[..., Any], x: Tensor, layout: Layout | None, state: Any = None
) -> tuple[Tensor, Any]:
    if not torch.is_grad_enabled() or state is not None:
        return plain(x, layout, state)
    return compiled(x, layout)
