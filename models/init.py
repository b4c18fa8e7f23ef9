"""Initial weights as a pure function of (seed, parameter name), so that every topology starts from the same model.

A module states one `Initializer` per parameter it owns in `initializers()`; `initial_values` runs them. A rule sees the
whole tensor, so a rank that holds a part draws the whole one and cuts.
"""

import hashlib
import math
from collections.abc import Callable, Container, Iterator

import torch
from torch import Tensor, nn

Initializer = Callable[[Tensor, torch.Generator], None]


def normal(std: float) -> Initializer:
    """N(0, std^2)."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def constant(value: float) -> Initializer:
    """Every entry equal to `value`."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(value)

    return fill


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """The random stream that belongs to the parameter called `name` under `seed`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fills every parameter of `model` with its `initial_values`."""
    for name, values in initial_values(model, seed):
        model.get_parameter(name).copy_(values)


def initial_values(model: nn.Module, seed: int, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and initial value of every parameter, tied ones once; drawn in fp32 on the CPU, so equal on every device.

    Of the model's parameters only names and shapes count: they may lie on the meta device. With `names` of these alone.

    Raises:
        TypeError: a module owns a parameter without a rule.
    """
    done: set[int] = set()
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        rules: dict[str, Initializer] = module.initializers() if hasattr(module, "initializers") else {}
        if own.keys() - rules.keys() and not all(id(p) in done for p in own.values()):
            raise TypeError(
                f"{type(module).__name__} {module_name!r} has no initial value for {own.keys() - rules.keys()}"
            )
        for name, rule in rules.items():
            done.add(id(own[name]))
            if names is not None and f"{module_name}.{name}" not in names:
                continue
            values = torch.empty(own[name].shape, dtype=torch.float32, device="cpu")
            rule(values, parameter_generator(seed, f"{module_name}.{name}"))
            yield f"{module_name}.{name}", values


class Linear(nn.Linear):
    """A linear map whose weights start as N(0, variance_scale / in_features), biases as zero (LeCun, 1998).

    Args:
        variance_scale: 1 keeps the variance of the input; maps that write into the residual stream take 2 / depth, so
            that the stream's variance does not grow with the number of layers.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, variance_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.variance_scale = variance_scale

    def reset_parameters(self) -> None:
        """Leaves the storage as it is: `initialize` fills it."""

    def initializers(self) -> dict[str, Initializer]:
        rules = {"weight": normal(math.sqrt(self.variance_scale / self.in_features))}
        return rules | {"bias": constant(0.0)} if self.bias is not None else rules
