"""What a mixer is told about the model it stands in, and how it reaches its op."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ops import Layout, resolve_impl


@dataclass(frozen=True, kw_only=True)
class Placement:
    """
    Attributes:
        width: D of the residual stream.
        output_scale: initial variance, times fan-in, of the map that writes into the stream.
        index, count: this mixer among those of its kind in the model, from the first block on.
        shared: what the mixers of its kind share (`shared_module` of its class), None where they share nothing.
        impl: op name -> implementation, `auto` where absent.
        device_type: where the model will run, for resolving `auto`.
    """

    width: int
    output_scale: float = 1.0
    index: int = 0
    count: int = 1
    shared: nn.Module | None = None
    impl: Mapping[str, str] = field(default_factory=dict)
    device_type: str = "cpu"

    def core(self, op: Callable[..., Any], **settings: Any) -> "OpCore":
        """`op` with its implementation resolved; `settings` are its arguments that never change."""
        return OpCore(op, self.choice(op), settings)

    def choice(self, op: Callable[..., Any]) -> str:
        """The implementation of `op` here."""
        return resolve_impl(op.__name__, self.impl.get(op.__name__, "auto"), self.device_type)


class OpCore(nn.Module):
    """A recurrence, convolution or attention alone, without parameters: what `parallel/` may wrap from outside.

    `core(*tensors, layout=..., initial_state=..., output_final_state=...)` is the op, and returns its pair.
    """

    def __init__(self, op: Callable[..., Any], impl: str, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.op = op
        self.impl = impl
        self.settings = dict(settings)

    def forward(
        self, *tensors: Tensor | None, layout: Layout | None, initial_state: Any, output_final_state: bool
    ) -> tuple[Tensor, Any]:
        return self.op(
            *tensors,
            layout=layout,
            initial_state=initial_state,
            output_final_state=output_final_state,
            impl=self.impl,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return ", ".join([self.op.__name__, self.impl, *(f"{key}={value}" for key, value in self.settings.items())])
