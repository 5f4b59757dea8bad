"""What a worker loads first: shards so small that a small log has many."""

from __future__ import annotations

from actstore.archive import grid


def dask_setup(_worker: object) -> None:
    """Cut arrays smaller; dask calls this in each worker process that was told to load it."""
    grid.CHUNK_BYTES, grid.SHARD_BYTES = 1 << 12, 1 << 14
