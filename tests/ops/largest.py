"""How large the tensors are that a computation makes."""

from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """While active, `numel` is the size of the largest tensor that any operation, registered ones inside, returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        registered = OPDEFS.get(func.name())
        if registered is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:  # a mode is off while it handles an operation, so that it would not see what the op does
                result = registered._init_fn(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result
