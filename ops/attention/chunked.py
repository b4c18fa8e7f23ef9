"""attention and local_attention in tiles of C queries and the keys that these see, with a hand-written backward.

A tile holds the whole score rows of its queries, so that their softmax is one of torch's, on cached memory, and nothing
is rescaled later. No score of T x (S+T) is kept: the backward forms each tile again. Keys before the first and behind
the last that a tile's queries see are skipped; on a CPU the documents tell which these are, elsewhere, where reading
them would wait for the device, causality and the window alone.

Sums over queries are formed tile by tile and then added: added to in place, they would be one chain over all T.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.attention.inputs import State, prepend
from ops.layout import Layout
from ops.precision import accumulation_dtype, without_autocast

# The scores of a tile, which with their gradients should stay in a core's cache.
TILE = 1 << 18


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    layout: Layout | None,
    initial_state: State | None,
    window: int | None = None,
) -> tuple[Tensor, State]:
    """o [B, T, H, K] and the keys and values [B, S+T, G, K]; arguments as in `ops.attention`, `ops.local_attention`."""
    keys, values = state = prepend(initial_state, k, v)
    num_previous = keys.shape[1] - q.shape[1]
    oldest = None if layout is None else layout.derive(oldest_keys, num_previous, window)
    return forward(q, keys, values, oldest, window, scale), state


def block_size(time: int) -> int:
    """C: of long sequences more, as fewer tiles are fewer sums, of short ones less, as half a tile is not visible."""
    return 64 if time < 1024 else 128


def oldest_keys(positions: Tensor, num_previous: int, window: int | None) -> Tensor:
    """int64 [B, T]: the first key that each query sees, for S = `num_previous` keys before the first query."""
    newest = torch.arange(num_previous, num_previous + positions.shape[1], device=positions.device)
    reach = positions if window is None else positions.clamp(max=window - 1)
    return (newest - reach).clamp(min=0).minimum(newest)


@torch.library.custom_op("rondo::attention_chunked_forward", mutates_args=())
def forward(q: Tensor, keys: Tensor, values: Tensor, oldest: Tensor | None, window: int | None, scale: float) -> Tensor:
    """o [B, T, H, K] of the queries q at the last T of the keys and values [B, S+T, G, K], in q's dtype.

    oldest: int64 [B, T], the first key that a query sees; without it only `window` says.
    """
    with without_autocast(q):
        k, v = _heads_first(keys), _heads_first(values)
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        scratch = _scratch(2, q, k, window)
        for tile in _tiles(q, k, oldest, window):
            weights = tile.weights(tile.queries(q, scale), tile.keys(k), *scratch)
            tile.write(o, torch.bmm(weights, tile.keys(v)))
    return o


@torch.library.custom_op("rondo::attention_chunked_backward", mutates_args=())
def backward(
    do: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    oldest: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, keys and values, in their dtypes, of that of o; the other arguments are `forward`'s."""
    with without_autocast(q):
        k, v = _heads_first(keys), _heads_first(values)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        scratch = _scratch(3, q, k, window)
        for tile in _tiles(q, k, oldest, window):
            queries, doutputs = tile.queries(q, scale), tile.queries(do)
            weights = tile.weights(queries, tile.keys(k), *scratch[:2])
            tile.add(dv, torch.bmm(weights.mT, doutputs))
            dweights, dscores = (z[: weights.numel()].view(weights.shape) for z in (scratch[0], scratch[2]))
            torch.bmm(doutputs, tile.keys(v).mT, out=dweights)
            # Of one visible key this is exactly 0, where o . do, rounded apart from dweights, would leave a difference.
            torch._softmax_backward_data(dweights, weights, -1, weights.dtype, grad_input=dscores)
            tile.add(dk, torch.bmm(dscores.mT, queries))
            tile.write(dq, torch.bmm(dscores, tile.keys(k)).mul_(scale))
    dkeys, dvalues = (z.to(keys.dtype).transpose(1, 2).contiguous() for z in (dk, dv))
    return dq, dkeys, dvalues


@forward.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, oldest: Tensor | None, window: int | None, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@backward.register_fake
def _(do: Tensor, q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(do, *ctx.saved_tensors, ctx.window, ctx.scale), None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)


def _heads_first(z: Tensor) -> Tensor:
    """[B, S+T, G, K] -> [B, G, S+T, K], contiguous, in the dtype of sums."""
    return z.transpose(1, 2).contiguous().to(accumulation_dtype(z))


def _scratch(count: int, q: Tensor, k: Tensor, window: int | None) -> list[Tensor]:
    """Room for the scores of a tile of queries [B, T, H, K] and keys [B, G, S+T, K]: fresh memory for each one would
    cost as much as its softmax."""
    block = min(block_size(q.shape[1]), q.shape[1])
    seen = k.shape[2] if window is None else min(k.shape[2], block + window - 1)
    one = q.shape[2] // k.shape[1] * block * seen
    size = max(one, min(TILE, len(q) * k.shape[1] * one))
    return [k.new_empty(size) for _ in range(count)]


class _Tile(NamedTuple):
    """Some rows and groups of heads, C of their queries, and the n keys among which are all that these see."""

    rows: slice
    groups: slice
    time: slice
    seen: slice
    num_groups: int
    hidden: Tensor  # bool [rows or 1, 1, 1, C, m]: which of the last m keys a query does not see; it sees those before

    def queries(self, z: Tensor, scale: float = 1.0) -> Tensor:
        """scale * z of z [B, T, H, K], as [rows * groups, R * C, K]: the R heads of a group share its keys."""
        z = self._of_queries(z).contiguous().to(accumulation_dtype(z))
        return (z if scale == 1.0 else scale * z).flatten(0, 1).flatten(1, 2)

    def write(self, total: Tensor, part: Tensor) -> None:
        """Into `total` [B, T, H, K] the part [rows * groups, R * C, K] of the tile's queries."""
        place = self._of_queries(total)
        place.copy_(part.view(place.shape))

    def _of_queries(self, z: Tensor) -> Tensor:
        z = z[self.rows, self.time].unflatten(2, (self.num_groups, -1))[:, :, self.groups]
        return z.permute(0, 2, 3, 1, 4)  # [rows, groups, R, C, K]

    def keys(self, z: Tensor) -> Tensor:
        """Of z [B, G, S+T, K] the tile's, [rows * groups, n, K]."""
        return z[self.rows, self.groups, self.seen].flatten(0, 1)

    def add(self, total: Tensor, part: Tensor) -> None:
        """To `total` [B, G, S+T, K] the part [rows * groups, n, K] of the tile's keys."""
        place = total[self.rows, self.groups, self.seen]
        place.add_(part.view(place.shape))

    def weights(self, queries: Tensor, keys: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
        """The softmax of all scores, [rows * groups, R * C, n], in the memory of `weights` by way of `scores`."""
        shape = (len(queries), queries.shape[1], keys.shape[1])
        scores, weights = (z[: math.prod(shape)].view(shape) for z in (scores, weights))
        torch.bmm(queries, keys.mT, out=scores)
        *_, count, width = self.hidden.shape
        heads = scores.unflatten(1, (-1, count)).unflatten(0, (-1, self.groups.stop - self.groups.start))
        heads[..., -width:].masked_fill_(self.hidden, -torch.inf)
        return torch.softmax(scores, -1, out=weights)


def _tiles(q: Tensor, k: Tensor, oldest: Tensor | None, window: int | None) -> Iterator[_Tile]:
    """All tiles of queries q [B, T, H, K] and keys k [B, G, S+T, K]."""
    (batch, time, heads, _), (_, groups, num_keys, _) = q.shape, k.shape
    block = block_size(time)
    for first in range(0, time, block):
        queries = slice(first, min(first + block, time))
        newest = range(num_keys - time + first, num_keys - time + queries.stop)
        start = 0 if window is None else max(0, newest[0] - window + 1)
        scores = heads * len(newest) * (newest[-1] + 1 - start)
        rows, some = max(1, TILE // scores), min(groups, max(1, TILE * groups // scores))
        for row in range(0, batch, rows):
            here = slice(row, min(row + rows, batch))
            seen, hidden = _visible(newest, start, None if oldest is None else oldest[here, queries], window, k.device)
            for group in range(0, groups, some):
                yield _Tile(here, slice(group, min(group + some, groups)), queries, seen, groups, hidden)


def _visible(
    newest: range, start: int, oldest: Tensor | None, window: int | None, device: torch.device
) -> tuple[slice, Tensor]:
    """The keys that a tile's queries may see, none before `start`, and `_Tile.hidden`, for the keys oldest [rows, C] to
    newest that each of them sees."""
    last, readable = torch.arange(newest.start, newest.stop, device=device)[:, None], _may_read(device)
    if oldest is not None and readable:
        start = int(oldest.min())
    if oldest is None and window is not None and start < newest[-1] - window + 1:
        oldest = (last.T - window + 1).clamp(min=0)
    if oldest is None or (readable and int(oldest.max()) <= start):  # only what follows a query is hidden
        hidden = last < last.T
    else:
        s = torch.arange(start, newest.stop, device=device)
        hidden = (s > last) | (s < oldest[:, :, None])
    return slice(start, newest.stop), hidden.expand(-1 if hidden.dim() == 3 else 1, -1, -1)[:, None, None]


def _may_read(device: torch.device) -> bool:
    """Whether values are at hand without waiting for an accelerator."""
    return device.type == "cpu"
