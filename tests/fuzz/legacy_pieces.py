"""A log of `llm-instrumentation` taken apart into its packets, changed, and put together again."""

from __future__ import annotations

import io
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import zstandard
from lz4 import frame as lz4
from mutations import INTEGERS, TEXTS, mutate_bytes

VECTORS: Final = Path(__file__).parents[2] / "schemas" / "vectors" / "legacy"
_HEAD: Final = struct.Struct("!HI")
_LZ4_MAGIC, _ZSTD_MAGIC = b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd"
_LONGEST: Final = 1 << 16


@cache
def vectors() -> tuple[bytes, ...]:
    """Give the logs of the vectors."""
    return tuple(path.read_bytes() for path in sorted(VECTORS.glob("*.stream")))


def taken_apart(data: bytes) -> list[tuple[bytes, bytes]]:
    """Give the whole packets of a log: names and payloads."""
    packets, at = [], 0
    while at + _HEAD.size <= len(data):
        name, payload = _HEAD.unpack_from(data, at)
        middle = at + _HEAD.size + name
        if middle + payload > len(data):
            break
        packets.append((data[at + _HEAD.size : middle], data[middle : middle + payload]))
        at = middle + payload
    return packets


def packet(name: bytes, payload: bytes) -> bytes:
    """Give a packet as it stands in a log."""
    return _HEAD.pack(len(name), len(payload)) + name + payload


def mutate(data: bytes, rng: Random) -> bytes:
    """Change a log: raw, or by its packets."""
    packets = taken_apart(data)
    if not packets or rng.randrange(5) == 0:
        return mutate_bytes(data, rng)[:_LONGEST]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(packets) + 1)
        match rng.randrange(8):
            case 0 if at < len(packets):
                packets.pop(at)
            case 1 if packets:
                packets[at:at] = [rng.choice(packets)] * rng.choice((1, 1, 20))
            case 2:
                packets.insert(at, (b"new", _bomb(rng)))
            case 3 if packets:
                name = rng.choice((*TEXTS, "\n")).encode("utf-8", "surrogatepass")
                packets[at % len(packets)] = (name, packets[at % len(packets)][1])
            case 4:
                packets[at:at] = [
                    (b"%d" % number, b"") for number in range(rng.choice((3, 3, 3, 900)))
                ]
            case _ if packets:
                name, payload = packets[at % len(packets)]
                packets[at % len(packets)] = (name, _other_payload(payload, rng))
    changed = b"".join(packet(*one) for one in packets)
    if rng.randrange(8) == 0:
        changed = changed[: rng.randrange(len(changed) + 1)]
    return changed[:_LONGEST]


@cache
def zeros(codec: str, size: int) -> bytes:
    """Encode zeros: what is little in the file, and much when it is decoded."""
    if codec == "lz4":
        return lz4.compress(bytes(size), store_size=True)
    return zstandard.ZstdCompressor().compress(bytes(size))


def decoded(payload: bytes) -> int:
    """Give the bytes that come out of a payload, if it is a frame that says so many."""
    stream: Any = None
    if payload[:4] == _ZSTD_MAGIC:
        stream = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(payload)
    elif payload[:4] == _LZ4_MAGIC:
        stream = lz4.open(io.BytesIO(payload))
    found = 0
    with suppress(zstandard.ZstdError, RuntimeError, EOFError, OSError):
        while stream is not None and (piece := stream.read(1 << 20)):
            found += len(piece)
    return max(found, len(payload))


def _bomb(rng: Random) -> bytes:
    """Give a payload of zeros that says what will come out, or something else."""
    codec = rng.choice(("lz4", "zstd"))
    payload = zeros(codec, rng.choice((0, 1, 1, 5, 1 << 16, 1 << 20, 9 << 20)))
    return _lie(payload, rng) if rng.randrange(2) else payload


def _other_payload(payload: bytes, rng: Random) -> bytes:
    return _lie(payload, rng) if rng.randrange(2) else mutate_bytes(payload, rng)


def _lie(payload: bytes, rng: Random) -> bytes:
    """Say another size in the header of a frame."""
    value = rng.choice(INTEGERS)
    if payload[:4] == _LZ4_MAGIC:  # flags with a size, the largest blocks, and a checksum to guess
        head = b"\x68\x70" + struct.pack("<Q", value)
        return _LZ4_MAGIC + head + bytes([rng.randrange(256)]) + payload[15:]
    if payload[:4] == _ZSTD_MAGIC:  # a window, and eight bytes of size
        window = bytes([rng.choice((0, 0x50, 0x88, 0xF8, rng.randrange(256)))])
        return _ZSTD_MAGIC + b"\xc0" + window + struct.pack("<Q", value) + payload[9:]
    return rng.choice((_LZ4_MAGIC, _ZSTD_MAGIC)) + payload
