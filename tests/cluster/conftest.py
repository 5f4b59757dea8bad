"""One cluster of worker processes for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

sys.path.insert(0, str(Path(__file__).parent))
from clusters import cluster_of


@pytest.fixture(scope="session")
def workers() -> Iterator[LocalCluster]:
    """Four processes whose shards are small; they die and come back."""
    with cluster_of(4, small=True) as cluster:
        yield cluster


@pytest.fixture
def client(workers: LocalCluster) -> Iterator[Client]:
    """A client that dask doesn't compute by unless it is told to."""
    with Client(workers, set_as_default=False) as client:
        client.wait_for_workers(4)
        yield client
