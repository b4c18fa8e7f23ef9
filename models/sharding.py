"""How parameters are cut over tensor ranks, as data that each module states in `sharding()` and `parallel/` applies.

A module whose parameters are cut takes an input that is equal on all ranks and works on its own heads, channels or
hidden units up to the maps that bring them together again; its forward reads every size from its tensors, so that the
same code runs whole and cut.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Cut:
    """A parameter cut along `dim`.

    Attributes:
        dim: which dimension.
        units: heads, blocks or channels, which stay whole, in each part of the dimension.
        sizes: of the parts, where several lie side by side in the dimension and each is cut on its own (as in a fused
            [q | k | v]); None for one part.
        repeats: where ranks exceed the units, several ranks hold the same unit and sum its gradients.
        fill: where the units do not divide, zeros are added at the end of the dimension until they do.
    """

    dim: int
    units: tuple[int, ...]
    sizes: tuple[int, ...] | None = None
    repeats: bool = False
    fill: bool = False


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """
    Attributes:
        cuts: parameter, by its name in the module -> its cut. Parameters that are not named stay whole.
        rows: linear submodules, by name, that bring the parts together: their products are summed over the ranks, and
            their bias is added once.
        spanning: norms, by name, whose mean square runs over all ranks.
        partial: whole parameters that each rank applies to its own heads: their gradients are summed.
        obstacle: why the module cannot be cut with its present settings.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    spanning: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    obstacle: str | None = None


def cut_outputs(module: nn.Module, names: Iterable[str], units: int, *, repeats: bool = False) -> dict[str, Cut]:
    """The cut of submodules by their outputs, the first dimension of all their parameters: linear maps, convolutions,
    block-diagonal maps, norms. Those that are None have nothing to cut."""
    parts = ((name, getattr(module, name)) for name in names)
    return {
        f"{name}.{key}": Cut(0, (units,), repeats=repeats)
        for name, part in parts
        if part is not None
        for key, _ in part.named_parameters()
    }
