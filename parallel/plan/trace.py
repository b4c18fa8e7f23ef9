"""What one module's forward and backward pass keep, move and compute, from running both on tensors without storage.

The module is the one that trains, cut over ranks as it will be: what autograd keeps is counted where autograd keeps it.
An operation moves what it reads and writes; recurrences, which are single operations to torch, by the factors below.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ops.impl import shapes_alone
from parallel.plan.world import BlankLayout, without_storage

CORE_FACTORS: dict[str, tuple[float, float]] = {
    "linear_scan": (1.1, 1.1),
    "gated_linear_attention": (4.5, 7.3),
    "gated_delta_rule": (2.0, 2.5),
    "diagonal_lstm": (1.2, 1.15),
    "diagonal_gru": (1.4, 1.15),
}
"""Times the reading and writing of its tensors that a recurrence is expected to take forward and backward, as derived
for the Triton kernels in docs/performance.md; the torch forms are slower on a GPU, and nobody has timed them there."""


@dataclass(frozen=True)
class Cost:
    """Of one pass over a microbatch on one rank; bytes, FLOPs and calls.

    Attributes:
        kept: between forward and backward pass, weights and their copies not counted.
        peak: the most that is alive in the backward pass, what is kept included; weights, copies and gradients are not.
        copies: autocast's, of weights.
        forward_flops, backward_flops: of matrix products.
        forward_bytes, backward_bytes: moved by everything else.
        core_bytes: of `forward_bytes`, the recurrence's.
        forward_calls, backward_calls: operations that the host starts.
    """

    kept: float = 0.0
    peak: float = 0.0
    copies: float = 0.0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    core_bytes: float = 0.0
    forward_calls: float = 0.0
    backward_calls: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __sub__(self, other: "Cost") -> "Cost":
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> "Cost":
        return Cost(*(factor * getattr(self, f.name) for f in fields(Cost)))


class Tracer(TorchDispatchMode):
    """Counts what runs while it is active, and the bytes of tensors made meanwhile that are alive; `copies` are those
    of weights that autocast keeps, which are of whole matrices, not of views."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, int] = {}
        self.flops = self.bytes = self.core_bytes = self.calls = 0.0
        self.alive = self.peak = 0
        self._watched: dict[int, weakref.ref[Any]] = {}
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        outputs = [z for z in tree_leaves(out) if isinstance(z, Tensor)]
        inputs = [z for z in tree_leaves((args, kwargs)) if isinstance(z, Tensor)]
        self._count(func, inputs, outputs, args, kwargs or {}, out)
        if is_weight_copy(func, args):
            storage = outputs[0].untyped_storage()
            self.copies[storage._cdata] = storage.nbytes()
        for z in outputs:
            self.watch(z)
        return out

    def watch(self, z: Tensor) -> None:
        """Counts the storage of `z` for as long as it is alive."""
        storage = z.untyped_storage()
        if storage._cdata in self._watched:
            return
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            if self._watched.pop(key, None) is not None:
                self.alive -= size

        self._watched[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _count(self, func: Any, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any, out: Any) -> None:
        if func.is_view or func.namespace in ("c10d", "prim", "symm_mem") or not outputs:
            return
        name = func.overloadpacket.__name__
        if name in ("empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "_unsafe_view", "reshape"):
            return
        self.calls += 1
        moved = float(sum(z.numel() * z.element_size() for z in (*inputs, *outputs)))
        packet = func.overloadpacket
        if packet in flop_registry and "attention" not in name:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        if func.namespace == "rondo":
            op = next((op for op in CORE_FACTORS if name.startswith(op)), None)
            moved *= CORE_FACTORS[op][self.backward] if op else 1.0
            self.core_bytes += moved if op else 0.0
        self.bytes += moved


def trace(
    module: nn.Module,
    call: Callable[..., Tensor],
    shape: tuple[int, int, int],
    *,
    time: int,
    bf16: bool,
) -> Cost:
    """The cost of `call(stream, layout)`, which runs `module`, forward and backward.

    Args:
        module: on the meta device; its parameters are given a CPU's shape without storage, in place.
        shape: [B, T, D] of the stream, fp32; of a share of the tokens where norms are sharded.
        time: of the layout.
        bf16: whether under autocast.
    """
    with without_storage(), shapes_alone():
        _blank(module)
        weights = {p.untyped_storage()._cdata for p in module.parameters()}
        stream = torch.empty(shape, requires_grad=True)
        layout = BlankLayout(shape[0], time)
        kept: dict[int, Any] = {}

        def keep(z: Tensor) -> Tensor:
            storage = z.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return z

        tracer = Tracer()
        handles = [p.register_post_accumulate_grad_hook(_drop) for p in module.parameters()]
        with tracer, torch.autocast("cpu", torch.bfloat16, enabled=False):  # outside, as in `Engine`: copies stay
            with saved_tensors_hooks(keep, lambda z: z), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = call(stream, layout)
            common = {z.untyped_storage()._cdata for z in tree_leaves(layout._derived) if isinstance(z, Tensor)}
            common.add(layout.positions.untyped_storage()._cdata)
            common.update(tracer.copies)
            size = sum(storage.nbytes() for key, storage in kept.items() if key not in common)
            of_stream = stream.untyped_storage().nbytes() if stream.untyped_storage()._cdata in kept else 0
            kept.clear()
            forward = tracer.flops, tracer.bytes, tracer.calls, tracer.core_bytes
            tracer.backward, tracer.peak = True, tracer.alive
            y.backward(torch.empty_like(y))
        for handle in handles:
            handle.remove()
    copies = sum(tracer.copies.values())
    return Cost(
        kept=size,
        peak=tracer.peak + of_stream - copies,
        copies=copies,
        forward_flops=forward[0],
        backward_flops=tracer.flops - forward[0],
        forward_bytes=forward[1],
        backward_bytes=tracer.bytes - forward[1],
        core_bytes=forward[3],
        forward_calls=forward[2],
        backward_calls=tracer.calls - forward[2],
    )


def is_weight_copy(func: Any, args: Any) -> bool:
    """Whether autocast keeps what this operation returns."""
    return func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter) and args[0].dim() > 1


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _blank(module: nn.Module) -> None:
    """Gives the module's parameters a CPU's tensors without storage; one that several modules share stays one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in [owner for part in module.modules() for owner in (part, *_shared(part))]:
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                made[made[parameter]] = made[parameter]
            setattr(owner, name, made[parameter])


def _shared(module: nn.Module) -> list[nn.Module]:
    """Modules that it reads besides its own (`models/mixers`)."""
    return [inner for outer in getattr(module, "shared", ()) for inner in outer.modules()]
