"""Owns the packets of logs of PyPI's ``llm-instrumentation`` 1.3.1: finding and decoding them.

What they mean together is ``legacy.py``'s. Such a log is packets back to back, each

====== ============== ==========================================================
bytes  name           description
====== ============== ==========================================================
2      name length    big-endian
4      payload length big-endian
n      layer name     UTF-8; that of a child of the model, empty for the model
m      payload        the tensor's bytes in C order as an LZ4 frame, a zstd
                      frame, or as they are
====== ============== ==========================================================

There is no header, no dtype, no shape, no end and no checksum.
"""

from __future__ import annotations

import io
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from actstore.errors import ConfigError, FormatError
from actstore.stream.scan import LogFile

__all__ = ["Codec", "Frame", "Packets", "decode", "find", "walk"]

Integers = NDArray[np.int64]

#: Bytes of a packet: what the tool's ring buffer holds, so that it writes none beyond.
PACKET_LIMIT: Final = 128 << 20
#: Bytes of a decoded payload.
RAW_LIMIT: Final = 1 << 30
#: Layers of a log.
LAYERS_LIMIT: Final = 1 << 16

_HEAD: Final = struct.Struct("!HI")
_SIGHT: Final = 512  # bytes read at a packet's place: its lengths and, mostly, its name
_FRAME_HEAD: Final = 18  # bytes of a zstd frame's header; an LZ4 frame's has 15
_BELIEVED: Final = 64 << 20  # from here on, memory is taken once that many bytes have come out
_PIECE: Final = 1 << 20

_LZ4_MAGIC: Final = b"\x04\x22\x4d\x18"
_LZ4_HEAD: Final = struct.Struct("<BBQ")  # behind the magic: flags, block size, content size
_LZ4_VERSIONS, _LZ4_VERSION, _LZ4_SIZED = 0xC0, 0x40, 0x08  # in flags
_LZ4_RATIO: Final = 255  # bytes that one encoded byte can stand for
_ZSTD_BLOCK: Final = 128 << 10  # bytes that a block of at least four can stand for
_ZSTD_WINDOW: Final = 8 << 20


class Codec(IntEnum):
    """How a payload is encoded."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2


# -- finding --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """A packet as it stands in the file.

    Attributes
    ----------
    offset : int
        Where it begins.
    name : str
        The layer's.
    start, length : int
        Where its payload is.
    head : bytes
        The first of the payload.
    """

    offset: int
    name: str
    start: int
    length: int
    head: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Packets:
    """The packets of a log as columns, in file order.

    Attributes
    ----------
    names : tuple of str
        The layers, in the order in which they appear.
    end : int
        Where the last packet ends.
    fault : str
        Why what follows is no packet; empty where it is nothing, or the beginning of one.
    offset, layer, start, length : numpy.ndarray
        int64: of each packet its place, its layer by number, and its payload's place and bytes.
    codec, raw : numpy.ndarray
        int64: what the payload is by its first bytes, and how many bytes it says will come out.
    """

    names: tuple[str, ...]
    end: int
    fault: str
    offset: Integers
    layer: Integers
    start: Integers
    length: Integers
    codec: Integers
    raw: Integers

    def compression(self) -> Codec | None:
        """Give the log's codec: that of most packets, a frame where half are; None of none."""
        counts = np.bincount(self.codec[self.length > 0], minlength=len(Codec))
        frames = counts[Codec.LZ4 :]
        if not counts.any():
            return None
        if frames.sum() < counts[Codec.NONE]:
            return Codec.NONE
        return Codec(Codec.LZ4 + int(frames.argmax()))


def walk(file: LogFile) -> Iterator[Frame]:
    """Yield the whole packets of a file.

    Raises
    ------
    FormatError
        What follows them can't be the beginning of one.
    """
    offset = 0
    while offset < file.size:
        sight = file.read(offset, min(_SIGHT, file.size - offset))
        if len(sight) < _HEAD.size:
            return
        name_length, length = _HEAD.unpack_from(sight)
        start = _HEAD.size + name_length
        if len(sight) == _SIGHT and start + length == _HEAD.size and not any(sight):
            msg = "zeros, which nothing wrote"  # else packets, of no name and no bytes
            raise FormatError(msg)
        if start + length > PACKET_LIMIT:
            msg = f"a packet of {start + length} bytes; the limit is {PACKET_LIMIT}"
            raise FormatError(msg)
        if offset + start + length > file.size:
            return
        wanted = start + min(length, _FRAME_HEAD)
        if len(sight) < wanted:
            sight = file.read(offset, wanted)
        try:
            name = sight[_HEAD.size : start].decode()
        except UnicodeDecodeError as error:
            msg = f"a packet whose layer's name is no UTF-8 ({error})"
            raise FormatError(msg) from error
        yield Frame(offset, name, offset + start, length, sight[start:wanted])
        offset += start + length


def find(file: LogFile) -> Packets:
    """Find the packets of a file; no payload is read."""
    numbers: dict[str, int] = {}
    rows, end, fault = array("q"), 0, ""
    try:
        for one in walk(file):
            if len(numbers) == LAYERS_LIMIT and one.name not in numbers:
                fault = f"more than {LAYERS_LIMIT} layers"
                break
            layer = numbers.setdefault(one.name, len(numbers))
            rows.extend((one.offset, layer, one.start, one.length, *_encoding(one)))
            end = one.start + one.length
    except FormatError as error:
        fault = str(error)
    columns = np.array(rows, np.int64).reshape(-1, 6).T
    return Packets(tuple(numbers), end, fault, *columns)


def _encoding(frame: Frame) -> tuple[Codec, int]:
    """Give the codec of a payload, and the bytes that it says will come out.

    One that can't hold what it says is none. The tool's LZ4 leaves the length out where it is 0.
    """
    head, length = frame.head, frame.length
    codec, raw, most = Codec.NONE, length, length
    if head.startswith(zstandard.FRAME_HEADER):
        try:
            raw = zstandard.get_frame_parameters(head).content_size
        except zstandard.ZstdError:
            return Codec.NONE, length
        codec, most = Codec.ZSTD, (length // 4 + 1) * _ZSTD_BLOCK
    elif head.startswith(_LZ4_MAGIC):
        flags, _, size = _LZ4_HEAD.unpack_from(head.ljust(_FRAME_HEAD, b"\0"), len(_LZ4_MAGIC))
        if flags & _LZ4_VERSIONS == _LZ4_VERSION:
            raw = size if flags & _LZ4_SIZED else 0
            codec, most = Codec.LZ4, length * _LZ4_RATIO
    return (codec, raw) if raw <= min(most, RAW_LIMIT) else (Codec.NONE, length)


# -- decoding -------------------------------------------------------------------------------------


def decode(codec: int, payload: bytes, raw: int) -> NDArray[np.uint8]:
    """Decode a payload, in memory of what comes out and no more.

    Parameters
    ----------
    codec, raw : int
        As `find` gives them.
    payload : bytes
        All of it.

    Returns
    -------
    numpy.ndarray
        uint8 [raw].

    Raises
    ------
    FormatError
        It doesn't decode to that many bytes.
    ConfigError
        It is an LZ4 frame, and the package that decodes those is not installed.
    """
    if codec == Codec.NONE:
        return np.frombuffer(payload, np.uint8)
    name = Codec(codec).name.lower()
    try:
        if raw > _BELIEVED:
            _check_length(_count(codec, payload, raw), raw, name)
        decoded = _whole(codec, payload, raw)
    except (zstandard.ZstdError, RuntimeError, EOFError) as error:
        msg = f"a {name} frame that does not decode: {error}"
        raise FormatError(msg) from error
    _check_length(len(decoded), raw, name)
    return np.frombuffer(decoded, np.uint8)


def _whole(codec: int, payload: bytes, raw: int) -> bytes:
    """Decode a frame at once, in memory for what it says, all of which must be one frame."""
    if codec == Codec.ZSTD:
        return zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    decompressor = _lz4_frame().LZ4FrameDecompressor()
    decoded: bytes = decompressor.decompress(payload, max_length=raw + 1)
    if not decompressor.eof or decompressor.unused_data:
        msg = "it does not end where its packet does"
        raise EOFError(msg)
    return decoded


def _count(codec: int, payload: bytes, most: int) -> int:
    """Count what comes out of a frame, until it is more than so many bytes, in little memory."""
    file: Any
    if codec == Codec.ZSTD:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        file = decompressor.stream_reader(payload)
    else:
        file = _lz4_frame().open(io.BytesIO(payload))
    found = 0
    with file:
        while found <= most and (piece := file.read(_PIECE)):
            found += len(piece)
    return found


def _check_length(found: int, raw: int, name: str) -> None:
    if found != raw:
        msg = f"a {name} frame of {found} bytes; it says {raw}"
        raise FormatError(msg)


def _lz4_frame() -> Any:
    try:
        import lz4.frame
    except ImportError as error:
        msg = "this log's packets are LZ4 frames: pip install 'actstore[legacy]' to decode them"
        raise ConfigError(msg) from error
    return lz4.frame
