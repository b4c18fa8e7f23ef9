"""Random inputs of the recurrences, as trained models have them."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Inputs:
    """Draws from one seed; `dtype` is that of activations, decays and strengths are fp32."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def keys(self, *shape: int) -> Tensor:
        """Of norm 1."""
        return normalize(self.normal(*shape, dtype=torch.float32), dim=-1).to(self.dtype)

    def log_decay(self, *shape: int) -> Tensor:
        """Memories of 5 tokens and more."""
        return torch.rand(shape, generator=self.generator, device=self.device) * -0.2

    def beta(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def scan(self, batch: int, time: int, width: int) -> dict[str, Tensor]:
        return {"x": self.normal(batch, time, width), "log_decay": self.log_decay(batch, time, width)}

    def linear_attention(self, batch: int, time: int, heads: int, keys: int, values: int) -> dict[str, Tensor]:
        shape = (batch, time, heads)
        q, k, v = (self.normal(*shape, width) for width in (keys, keys, values))
        return {"q": q, "k": k, "v": v, "log_decay": self.log_decay(*shape, keys)}

    def attention(self, batch: int, time: int, heads: int, groups: int, width: int) -> dict[str, Tensor]:
        return {name: self.normal(batch, time, n, width) for name, n in (("q", heads), ("k", groups), ("v", groups))}

    def delta_rule(self, batch: int, time: int, heads: int, keys: int, values: int) -> dict[str, Tensor]:
        shape = (batch, time, heads)
        tensors = {"q": self.normal(*shape, keys), "k": self.keys(*shape, keys), "v": self.normal(*shape, values)}
        return tensors | {"log_decay": self.log_decay(*shape), "beta": self.beta(*shape)}

    def lstm(self, batch: int, time: int, width: int) -> dict[str, Tensor]:
        a, c = (0.3 * self.normal(n, width, dtype=torch.float32) for n in (3, 2))
        return {"gates": self.normal(batch, time, 3, width), "a": a, "c": c}

    def gru(self, batch: int, time: int, width: int) -> dict[str, Tensor]:
        return {"gates": self.normal(batch, time, 3, width), "a": 0.3 * self.normal(3, width, dtype=torch.float32)}
