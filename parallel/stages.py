"""Which blocks each pipeline stage holds, and which parameters: pure functions of the model, whole and without storage.

A stage is a run of neighbouring blocks; the first holds the embedding besides, the last the head. A parameter that
blocks of several stages read, or a tied embedding, is held by each of them.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn

from models.lm import LM


@dataclass(frozen=True)
class Stages:
    """
    Attributes:
        bounds: the first block of each stage, and the number of blocks.
        names: of the parameters that each stage holds, as the model calls them.
    """

    bounds: tuple[int, ...]
    names: tuple[frozenset[str], ...]

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """Parameters that several stages hold, and these stages, in order."""
        holders = {name: tuple(i for i, held in enumerate(self.names) if name in held) for name in self._everywhere()}
        return {name: stages for name, stages in sorted(holders.items()) if len(stages) > 1}

    def owned_before(self, index: int) -> frozenset[str]:
        """Parameters of stage `index` that an earlier one holds too."""
        return self.names[index] & self._everywhere(index)

    def _everywhere(self, stop: int | None = None) -> frozenset[str]:
        return frozenset(itertools.chain.from_iterable(self.names[:stop]))


def stages_of(model: LM, sequence_length: int, size: int, blocks: Sequence[int] | None = None) -> Stages:
    """The `size` stages of `model`: of so many `blocks` each, or of FLOPs as even as can be.

    Raises:
        ValueError: there are fewer blocks than stages, or `blocks` are not all of them.
    """
    count = len(model.blocks)
    if size > count:
        raise ValueError(
            f"parallel.pipeline: {size}; must be at most the {count} blocks of model.layers, as each stage needs one: "
            f"choose among 1 to {count}"
        )
    costs = [block.flops_per_token(sequence_length) for block in model.blocks]
    balanced = balance(costs, model.head.flops_per_token(), size)
    if blocks is not None and sum(blocks) != count:
        raise ValueError(
            f"parallel.stages: {list(blocks)}; these are {sum(blocks)} blocks, but model.layers has {count}; choose "
            f"e.g. {list(balanced)}"
        )
    bounds = tuple(itertools.accumulate(balanced if blocks is None else blocks, initial=0))
    return Stages(bounds, tuple(_held(model, bounds, index) for index in range(size)))


def balance(costs: Sequence[int], head: int, size: int) -> tuple[int, ...]:
    """How many of the blocks of these `costs` go to each of `size` stages, the last of which has the head besides.

    The dearest stage is as cheap as can be; of the divisions that reach this, the most even one.
    """
    count = len(costs)
    assert 1 <= size <= count, (size, count)
    before = list(itertools.accumulate(costs, initial=0))

    def divide(value: Callable[[int], float], join: Callable[[float, float], float]) -> tuple[float, tuple[int, ...]]:
        """The division of the least value, joined over its stages; of equal ones that with the fewest blocks first."""

        @cache
        def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
            if stages == 1:
                return value(before[count] - before[first] + head), (count - first,)
            choices = []
            for length in range(1, count - first - stages + 2):
                rest, lengths = best(first + length, stages - 1)
                choices.append((join(value(before[first + length] - before[first]), rest), (length, *lengths)))
            return min(choices)

        return best(0, size)

    limit, _ = divide(lambda cost: cost, max)
    return divide(lambda cost: cost**2 if cost <= limit else float("inf"), lambda a, b: a + b)[1]


def bubble(num_microbatches: int, size: int) -> float:
    """The share of a step that each stage waits, were all equally fast: of 1F1B (arXiv 1806.03377)."""
    return (size - 1) / (num_microbatches + size - 1)


def describe(stages: Stages, num_microbatches: int) -> str:
    """The stages and what waiting for each other costs them, for the log."""
    runs = ", ".join(f"{first} to {after - 1}" for first, after in itertools.pairwise(stages.bounds))
    text = (
        f"pipeline: blocks {runs}; of a step of {num_microbatches} microbatches each stage waits "
        f"{bubble(num_microbatches, stages.size):.0%}"
    )
    if num_microbatches >= stages.size:
        return text
    return (
        f"{text}; warning: fewer microbatches than the {stages.size} stages, of which some never work side by side: "
        "raise train.batch_size or lower train.micro_batch_size"
    )


class Held(nn.Module):
    """A parameter of another stage's module, under its name, for one of this stage that reads it too."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))


def keep_stage(model: LM, stages: Stages, index: int) -> None:
    """Takes out of `model`, in place, what stage `index` does not hold; what stays keeps its names."""
    names = stages.names[index]
    for i in range(len(model.blocks)):
        if not stages.bounds[index] <= i < stages.bounds[index + 1]:
            model.blocks[i] = nn.Identity()
    for kind, module in list(model.shared.items()):
        if not any(f"shared.{kind}.{name}" in names for name, _ in module.named_parameters()):
            del model.shared[kind]
    if index > 0:
        held = "embed.weight" in names
        model.embed = Held(model.embed.weight) if held else nn.Identity()  # type: ignore[assignment]
    if index < stages.size - 1:
        model.head = nn.Identity()  # type: ignore[assignment]
    assert {name for name, _ in model.named_parameters()} == names, "each mixer states in `shared` what it reads"


def _held(model: LM, bounds: Sequence[int], index: int) -> frozenset[str]:
    """Names of the parameters that stage `index` reads."""
    modules: list[nn.Module] = list(model.blocks[bounds[index] : bounds[index + 1]])
    modules += [shared for block in list(modules) for part in block.modules() for shared in getattr(part, "shared", ())]
    if index == 0:
        modules.append(model.embed)
    if index == len(bounds) - 2:
        modules.append(model.head)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return frozenset(names[parameter] for module in modules for parameter in module.parameters())
