"""The logs that llm-instrumentation 1.3.1 wrote, what they hold, and how such a log is built.

`tests/legacy/make_logs.py` made them with the tool itself, and says what is in them.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, Final

import lz4.frame
import pytest
import zstandard

VECTORS: Final = Path(__file__).parents[2] / "schemas" / "vectors"
LOGS: Final = sorted((VECTORS / "legacy").glob("*.stream"))
#: Encodes a payload as the tool does.
ENCODE: Final = {
    "none": bytes,
    "lz4": lambda data: lz4.frame.compress(data, compression_level=1),
    "zstd": zstandard.ZstdCompressor(level=3).compress,
}

by_name = pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
by_codec = pytest.mark.parametrize("codec", ENCODE)


def named(name: str) -> Path:
    return VECTORS / "legacy" / name


def copied(name: str, log: Path) -> Path:
    """Copy a log without the files beside it."""
    shutil.copyfile(named(f"{name}.stream"), log)
    return log


def expected(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text("ascii"))


def expected_values(path: Path) -> dict[str, list[bytes]]:
    said = expected(path)["values"]
    return {name: [bytes.fromhex(one["hex"]) for one in mine] for name, mine in said.items()}


def values(reader: Any) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for packet in reader.packets():
        found.setdefault(packet.layer, []).append(packet.values.tobytes())
    return found


def flat(reader: Any) -> list[tuple[str, bytes]]:
    return [(packet.layer, packet.values.tobytes()) for packet in reader.packets()]


def packet(name: bytes, payload: bytes) -> bytes:
    """Build a packet, by the format alone."""
    return struct.pack("!HI", len(name), len(payload)) + name + payload
