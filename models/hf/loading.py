"""Reading a directory back with the class it was written for."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.hf.formats import Loaded, shown


def require(key: str, value: Any, fits: bool, requirement: str) -> None:
    """Raises ValueError, of a `config.json` that is to be imported, unless `fits`."""
    if not fits:
        raise ValueError(f"config.json: {key}: {shown(value)}; Rondo has this model only with {requirement}")


def load_transformers(model_class: Any, directory: Path, **options: Any) -> Loaded:
    """`directory` in fp32 through a class of transformers, on the CPU."""
    model = model_class.from_pretrained(directory, dtype=torch.float32, **options).eval()

    @torch.no_grad()
    def logits(input_ids: Tensor) -> Tensor:
        return model(input_ids, use_cache=False).logits

    @torch.no_grad()
    def generate(prompt: Tensor, count: int) -> Tensor:
        every = torch.ones_like(prompt)  # also what looks like padding
        return model.generate(prompt, attention_mask=every, max_new_tokens=count, do_sample=False)

    how = f"loaded with transformers' `{type(model).__name__}`, logits and greedy generation compared"
    return Loaded(logits, generate, how)


def import_without(module: str, *packages: str) -> Any:
    """A module of its own copy, imported as if `packages` were not installed.

    Model files of transformers bind GPU kernels when they are imported, if a library that has some is installed; these
    fail on a CPU. Who has imported the module before keeps theirs.
    """
    with _absent(module), _absent(*packages, block=True):
        return importlib.import_module(module)


@contextmanager
def _absent(*names: str, block: bool = False) -> Iterator[None]:
    """Modules that are not in `sys.modules` meanwhile, and cannot be imported if `block`."""
    modules: dict[str, Any] = sys.modules
    before = {name: modules.pop(name) for name in names if name in modules}
    modules.update(dict.fromkeys(names) if block else {})
    try:
        yield
    finally:
        for name in names:
            modules.pop(name, None)
        modules.update(before)
