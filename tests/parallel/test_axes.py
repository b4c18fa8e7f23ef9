"""The grid's axes without processes: every rank's coordinates and groups, and what is cut by them."""

from itertools import product

import pytest
import torch

from models.sharding import Cut
from parallel.axes import AXES, Axis, make_axes
from parallel.tensor import part_of, whole_of

SIZES = [(1, 1, 1, 1), (1, 2, 1, 2), (2, 1, 2, 2), (1, 2, 3, 2), (3, 2, 2, 1), (2, 2, 2, 2)]


@pytest.mark.parametrize("counts", SIZES)
def test_ranks_lie_on_the_grid_in_the_order_of_its_axes(counts: tuple[int, ...]) -> None:
    sizes = dict(zip(AXES, counts))
    for rank, place in enumerate(product(*map(range, counts))):
        axes = make_axes(rank, sizes)
        assert tuple(axes[name].index for name in AXES) == place
        assert tuple(axes[name].size for name in AXES) == counts
        assert axes["replicas"].index == place[1] * counts[2] + place[2], "data before sequence"
        assert axes["tensor"].ranks == tuple(rank - place[3] + i for i in range(counts[3])), "neighbours"


@pytest.mark.parametrize("counts", SIZES)
def test_groups_are_the_same_for_all_their_ranks_and_cover_all(counts: tuple[int, ...]) -> None:
    sizes = dict(zip(AXES, counts))
    world = [make_axes(rank, sizes) for rank in range(torch.tensor(counts).prod())]
    for name in (*AXES, "replicas", "stage"):
        for rank, axes in enumerate(world):
            axis = axes[name]
            assert axis.ranks[axis.index] == rank
            assert list(axis.ranks) == sorted(axis.ranks), "a process group sorts its ranks; gathered parts follow it"
            assert all(world[other][name].ranks == axis.ranks for other in axis.ranks)
        assert sum(1 / axes[name].size for axes in world) == pytest.approx(len({axes[name].ranks for axes in world}))


def test_a_rank_outside_the_grid_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        make_axes(4, dict.fromkeys(AXES, 1) | {"data": 4})


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_part_of_an_axis(parts: int) -> None:
    ranks = tuple(range(8, 24, 2))
    for index in range(8):
        part = Axis("tensor", index, ranks).part(parts)
        assert part.size == 8 // parts
        assert part.ranks[part.index] == ranks[index]
        assert part.ranks == ranks[index // part.size * part.size :][: part.size]


CUTS = {
    "rows": ((12, 3), Cut(0, (4,))),
    "columns": ((3, 12), Cut(1, (4,))),
    "fused": ((4 + 4 + 16, 2), Cut(0, (4, 4, 8), sizes=(4, 4, 16))),
    "repeated": ((2 * 3, 5), Cut(0, (2,), repeats=True)),
    "one, repeated": ((7,), Cut(0, (1,), repeats=True)),
    "filled": ((61, 2), Cut(0, (61,), fill=True)),
    "filled, of fewer entries than ranks": ((3, 2), Cut(0, (3,), fill=True)),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_make_the_whole(name: str, size: int) -> None:
    shape, cut = CUTS[name]
    whole = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)
    parts = [part_of(whole, cut, Axis("tensor", index, tuple(range(size)))) for index in range(size)]
    assert len({part.shape for part in parts}) == 1, "ranks hold equally much"
    assert all(part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() for part in parts)
    assert torch.equal(whole_of(parts, cut, whole.shape), whole)


def test_parts_of_a_fused_parameter_are_cut_each() -> None:
    q, k, v = torch.arange(0, 4), torch.arange(10, 14), torch.arange(20, 28)
    part = part_of(torch.cat([q, k, v]), Cut(0, (4, 4, 8), sizes=(4, 4, 8)), Axis("tensor", 1, (0, 1)))
    assert part.tolist() == [2, 3, 12, 13, 24, 25, 26, 27]


def test_neighbours_hold_the_same_repeated_unit() -> None:
    parts = [part_of(torch.arange(4), Cut(0, (2,), repeats=True), Axis("tensor", i, (0, 1, 2, 3))) for i in range(4)]
    assert [part.tolist() for part in parts] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_what_is_filled_up_is_zero() -> None:
    parts = [part_of(torch.ones(5), Cut(0, (5,), fill=True), Axis("tensor", i, (0, 1))) for i in range(2)]
    assert [part.tolist() for part in parts] == [[1, 1, 1], [1, 1, 0]]
