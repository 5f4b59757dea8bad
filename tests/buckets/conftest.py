"""What every test of buckets shares: one S3 server, and a way to it for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from loopback import Way, options, s3_server, way_to


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Give the port of an S3 server."""
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture
def way(s3: int) -> Iterator[Way]:
    """Give a way to the server, on which nothing goes wrong yet."""
    with way_to(s3) as found:
        yield found


@pytest.fixture
def said(way: Way) -> dict[str, Any]:
    """Give the storage options that lead over that way."""
    return options(way.endpoint)


@pytest.fixture
def url() -> str:
    """Give a URL that nothing has."""
    return f"s3://bucket/{uuid.uuid4().hex}"
