"""Every row of an epoch is in one batch of one rank, whatever the sizes; ranks keep in step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from actstore.errors import ConfigError
from actstore.training.order import Order


def order(counts: list[int], **options: object) -> Order:
    said = {
        "batch_size": 4, "window": 2, "seed": 0, "shuffle": True, "drop_last": False, "rank": 0,
        "world_size": 1,
    }  # fmt: skip
    return Order(np.array(counts, np.int64), **(said | options))  # type: ignore[arg-type]


def rows_of(mine: Order, epoch: int = 0) -> list[list[tuple[int, int]]]:
    """Give the (unit, row) of each batch, by the pieces of the windows."""
    found = []
    for window in range(mine.windows):
        one = mine.epoch(epoch)
        sizes = one.sizes(window)
        places: list[tuple[int, int] | None] = [None] * sum(sizes)
        for piece in one.pieces(window):
            for row, slot in zip(
                range(piece.first, piece.last), piece.slots.tolist(), strict=True
            ):
                assert places[slot] is None
                places[slot] = (piece.unit, row)
        assert None not in places
        ends = np.cumsum(sizes).tolist()
        found += [places[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return found  # type: ignore[return-value] # none is None


@given(
    counts=some.lists(some.integers(0, 30), min_size=1, max_size=12),
    batch=some.integers(1, 20),
    window=some.integers(1, 4),
    world=some.integers(1, 5),
    seed=some.integers(0, 3),
    shuffle=some.booleans(),
    drop=some.booleans(),
)
def test_ranks_have_disjoint_rows_and_equally_many_batches(
    counts: list[int], batch: int, window: int, world: int, seed: int, shuffle: bool, drop: bool
) -> None:
    total = sum(counts)
    options = {
        "batch_size": batch, "window": window, "seed": seed, "shuffle": shuffle,
        "drop_last": drop, "world_size": world,
    }  # fmt: skip
    odd = total < world or (batch == 1 and total % world and not drop)
    odd = odd or (drop and total // world < batch)
    if odd:
        with pytest.raises(ConfigError):
            order(counts, **options)
        return
    ranks = [rows_of(order(counts, rank=rank, **options), epoch=seed) for rank in range(world)]
    assert len({len(one) for one in ranks}) == 1
    rows = [row for one in ranks for mine in one for row in mine]
    assert len(set(rows)) == len(rows)
    every = {(unit, row) for unit, count in enumerate(counts) for row in range(count)}
    if drop:
        assert set(rows) <= every
        assert all(len(mine) == batch for one in ranks for mine in one)
        assert len(every) - len(rows) < world * batch + world
    else:
        assert set(rows) == every
        assert all(1 <= len(mine) <= batch for one in ranks for mine in one)
        assert all(len(mine) >= batch - 1 for one in ranks for mine in one[:-1])


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    counts = [10] * 20
    first, again = rows_of(order(counts)), rows_of(order(counts))
    assert first == again
    assert rows_of(order(counts), epoch=1) != first
    assert rows_of(order(counts, seed=1)) != first


def test_without_shuffling_rows_come_as_they_stand() -> None:
    found = rows_of(order([5, 0, 7], shuffle=False))
    wanted = [(0, row) for row in range(5)] + [(2, row) for row in range(7)]
    assert [row for mine in found for row in mine] == wanted


def test_rows_are_mixed_over_the_chunks_of_a_buffer() -> None:
    found = rows_of(order([64] * 8, batch_size=64, window=8))
    assert all(len({unit for unit, _ in batch}) >= 4 for batch in found)
