"""The logs that a reader must refuse, or read but for what is damaged."""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from building import (
    BLOCK,
    COMMIT,
    FEATURES,
    HEADER,
    LAYER,
    MAGIC,
    PAD,
    PASS,
    SYNC,
    TEXT,
    TOKEN,
    Axis,
    Log,
    Run,
    begun,
    block_header,
    crc32c,
    document,
    frame,
)
from good_logs import LZ4, STAIRS, STAIRS_LZ4, empty_closed


class Bad(NamedTuple):
    """A bad log, and what a reader makes of it."""

    data: bytes
    offset: int | None
    before: Sequence[int] = ()
    skip: Sequence[int] | None = None
    error: str = "StreamCorruptError"


BAD: dict[str, tuple[str, Callable[[], Bad]]] = {}


def bad(about: str) -> Callable[[Callable[[], Bad]], Callable[[], Bad]]:
    """Register a bad vector; it is named as the function is."""

    def register(make: Callable[[], Bad]) -> Callable[[], Bad]:
        BAD[make.__name__.replace("_", "-")] = (about, make)
        return make

    return register


def refused(data: bytes, error: str = "FormatError") -> Bad:
    """Give a file that no reader reads anything of."""
    return Bad(data, None, error=error)


def _amid(name: str, about: str, write: Callable[[Log], int], *, closed: bool = True) -> None:
    """Register a log of packets 0 and 2 with something damaged, of its own group, between them.

    `write` appends that and gives its offset.
    """

    def make() -> Bad:
        log = begun()
        log.tensor(0, 1.0)
        log.commit(1, 1)
        offset = write(log)
        log.commit(2, 1)
        log.tensor(2, 3.0)
        log.commit(3, 1)
        if closed:
            log.close()
        return Bad(bytes(log.data), offset, [0], [0, 2])

    BAD[name] = (about, make)


@bad("No bytes.")
def empty() -> Bad:
    return refused(b"")


@bad("The first byte is another.")
def wrong_magic() -> Bad:
    return refused(b"\x88" + bytes(empty_closed().data[1:]))


@bad("Cut in the magic.")
def short_magic() -> Bad:
    return refused(MAGIC[:5])


@bad("A log of version 1.")
def other_version() -> Bad:
    data = empty_closed().data
    return refused(bytes(data[:7] + b"\x02" + data[8:]), "UnsupportedVersionError")


@bad("Cut in the HEADER.")
def cut_in_header() -> Bad:
    return Bad(bytes(Log().data[:-1]), 8)


@bad("A flipped bit in the HEADER's JSON.")
def flipped_header() -> Bad:
    data = empty_closed().data
    data[8 + 40 + 3] ^= 0x10
    return Bad(bytes(data), 8, [], [])


@bad("A flipped bit in the HEADER's JSON, before packets.")
def flipped_header_before_packets() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    data = log.data
    data[8 + 40 + 3] ^= 0x10
    return Bad(bytes(data), 8, [], [0])


@bad("The HEADER is an array.")
def header_no_object() -> Bad:
    return Bad(MAGIC + frame(HEADER, b"[]", b""), 8)


@bad("The first record is a COMMIT.")
def header_missing() -> Bad:
    return Bad(MAGIC + frame(COMMIT, struct.pack("<QQQQB", 8, 0, 0, 0, 1), b""), 8)


@bad("A sync marker of zeros, which would begin at each byte of a hole.")
def sync_of_zeros() -> Bad:
    header = document({"codecs": {"0": None}})
    head = bytes(16) + struct.pack("<BBHIQI", HEADER, 0, 0, len(header), 0, 0)
    record = head + struct.pack("<I", crc32c(head + header)) + header
    return Bad(MAGIC + record + bytes(256), 8)


@bad("The HEADER declares a codec that a reader must not run.")
def codec_not_allowed() -> Bad:
    log = Log({"0": None, "1": {"id": "pickle", "protocol": 5}})
    log.commit(boundary=1)
    return refused(bytes(log.data))


@bad("The HEADER declares no codecs.")
def no_codecs() -> Bad:
    return refused(MAGIC + frame(HEADER, b"{}", b""))


def _flip(name: str, about: str, place: int, *, closed: bool) -> None:
    def write(log: Log) -> int:
        offset = log.tensor(1, 2.0)
        log.data[offset + place] ^= 0x04
        return offset

    _amid(name, about, write, closed=closed)


_flip("flipped-payload", "A flipped bit in the payload of a BLOCK.", 128, closed=True)
_flip("flipped-sync", "A flipped bit in a sync marker.", 3, closed=False)
_flip("flipped-frame", "A flipped bit in the length of a payload.", 27, closed=False)
_flip("flipped-block", "A flipped bit in the header of a BLOCK.", 45, closed=False)


@bad("A flipped bit in the directory of a COMMIT that more follows: the log still says all else.")
def flipped_directory() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    offset = log.commit(1, 1)
    log.data[-1] ^= 1
    log.tensor(1, 2.0)
    log.commit(2, 1)
    log.close()
    return Bad(bytes(log.data), offset, [0], [0, 1])


@bad("A flipped bit in the summary of an INDEX.")
def flipped_index() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    offset = len(log.data)
    log.close({"packets": 1})
    log.data[log.data.rindex(SYNC) - 3] ^= 1
    return Bad(bytes(log.data), offset, [0], [0])


@bad("An INDEX that says a COMMIT is where a BLOCK is.")
def index_lies() -> Bad:
    log = begun()
    place = log.tensor(0, 1.0)
    log.commit(1, 1)
    offset = log.close(commits=[log.commits[0], place])
    return Bad(bytes(log.data), offset, [0], [0])


@bad("An END that says the INDEX is where a COMMIT is.")
def end_lies() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.close(index_offset=log.commits[-1])
    return Bad(bytes(log.data), log.data.rindex(SYNC), [0], [0])


@bad("An END that says the INDEX is beyond the file.")
def end_beyond_file() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.close(index_offset=2**40)
    return Bad(bytes(log.data), log.data.rindex(SYNC), [0], [0])


@bad("An INDEX that names a COMMIT twice.")
def index_twice() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    last = log.commit(1, 1)
    offset = log.close(commits=[*log.commits, last])
    return Bad(bytes(log.data), offset, [0], [0])


@bad("An INDEX that names the COMMITs in another order.")
def index_order() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.tensor(1, 2.0)
    log.commit(2, 1)
    offset = log.close(commits=[log.commits[place] for place in (0, 2, 1)])
    return Bad(bytes(log.data), offset, [0, 1], [0, 1])


@bad("A flipped bit in the header of the last COMMIT of a closed log: its group is not believed.")
def flipped_last_commit() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.tensor(1, 2.0)
    offset = log.commit(2, 1)
    log.close()
    log.data[offset + 45] ^= 1
    return Bad(bytes(log.data), offset, [0], [0])


@bad("A closed log whose last COMMIT and all behind it but the magic was overwritten by zeros.")
def zeros_before_the_last_magic() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.tensor(1, 2.0)
    offset = log.commit(2, 1)
    log.close()
    end = len(log.data) - len(MAGIC)
    log.data[offset:end] = bytes(end - offset)
    return Bad(bytes(log.data), offset, [0], [0])


@bad("A flipped bit in the payload of a PASS.")
def flipped_pass() -> Bad:
    log = Log()
    log.commit(boundary=1)
    offset = log.pass_(0, [Axis("token", 1, 1, [0], [1])])
    log.data[-1] ^= 1
    log.commit(0, 1)
    log.close()
    return Bad(bytes(log.data), offset, [], [])


@bad("Garbage between two groups.")
def garbage_between() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    offset = len(log.data)
    log.data += b"garbage" + SYNC + b"garbage"
    log.tensor(1, 2.0)
    log.commit(2, 1)
    return Bad(bytes(log.data), offset, [0], [0, 1])


# What a record declares, and what it holds.

ONE = struct.pack("<f", 2.0)
ONE_RUN = Run(1, call=1)


def _block(name: str, about: str, header: Callable[[], bytes], payload: bytes = ONE) -> None:
    """Register a log whose second BLOCK has this header and this payload."""
    _amid(name, about, lambda log: log.record(BLOCK, header(), payload))


def _shaped(shape: Sequence[int], run: Run = ONE_RUN, **lies: int) -> Callable[[], bytes]:
    return lambda: block_header([run], [shape], 4, **lies)


_block(
    "raw-length-lies",
    "A BLOCK of more raw bytes than its packets have.",
    _shaped([1], raw_length=8),
)
_block(
    "payload-short", "A raw BLOCK whose payload is shorter than it says.", _shaped([1]), ONE[:3]
)
_block("payload-long", "A raw BLOCK whose payload is longer than it says.", _shaped([1]), ONE * 2)
_block(
    "raw-length-limit",
    "A BLOCK of over 2^24 raw bytes.",
    _shaped([2**22 + 1], raw_length=2**24 + 4),
)
_block("shape-count-lies", "A BLOCK with more shapes than it holds.", _shaped([1], shape_count=9))
_block("shape-count-limit", "A BLOCK of over 65,536 shapes.", _shaped([1], shape_count=65537))
_block("run-count-lies", "A BLOCK with more runs than it holds.", _shaped([1], run_count=2))
_block("run-count-short", "A BLOCK with fewer runs than it holds.", _shaped([1], run_count=0))
_block("run-count-huge", "A BLOCK of 2^32 - 1 runs.", _shaped([1], run_count=2**32 - 1))
_block("header-short", "A BLOCK whose header ends early.", lambda: _shaped([1])()[:-1])
_block("header-long", "A BLOCK whose header goes on.", lambda: _shaped([1])() + b"\x00")
_block("layer-undeclared", "A BLOCK of a layer that no LAYER declares.", _shaped([1], layer=9))
_block(
    "codec-undeclared",
    "A BLOCK of a codec that the HEADER doesn't declare.",
    _shaped([1], codec=9),
)
_block("dtype-unknown", "A BLOCK of dtype 21.", _shaped([1], dtype=21))
_block("dtype-zero", "A BLOCK of dtype 0.", _shaped([1], dtype=0))
_block("block-reserved", "A BLOCK whose reserved bytes aren't 0.", _shaped([1], reserved=1))
_block(
    "run-reserved",
    "A run whose reserved bytes aren't 0.",
    _shaped([1], Run(1, call=1, reserved=256)),
)
_block("run-empty", "A run of no packets.", _shaped([1], Run(1, call=1, count=0)))
_block("run-shape", "A run of a shape that the block doesn't have.", _shaped([1], Run(1, shape=1)))
_block("run-part", "Part 2 of 2.", _shaped([1], Run(1, call=1, part=2, parts=2)))
_block("run-no-parts", "Part 0 of 0.", _shaped([1], Run(1, call=1, part=0, parts=0)))
_block(
    "packets-limit",
    "A BLOCK of 65,537 packets.",
    lambda: block_header([Run(1, count=65537, seq_step=1)], [[0]], 0),
    b"",
)
_block("no-packets", "A BLOCK of no packets.", lambda: block_header([], [], 0), b"")
_block(
    "parts-together",
    "Two parts in one block.",
    lambda: block_header([Run(1, part=0, parts=2), Run(1, part=1, parts=2)], [[1]], 4),
)
_block("dimensions-limit", "A shape of 65 dimensions.", _shaped([1] * 65))
_block(
    "shape-huge",
    "A shape of 2^192 elements.",
    _shaped([2**64 - 1] * 3, raw_length=2**32 - 4),
)
_block(
    "shape-huge-empty",
    "A shape of no elements whose other dimensions are beyond any memory.",
    lambda: block_header([Run(1, call=1)], [[2**61, 0]], 0),
    b"",
)
_block(
    "alias-before-all",
    "An alias of a packet before the first.",
    lambda: block_header([Run(1, back=2, call=1)], [[1]], 0),
    b"",
)
_block(
    "alias-of-another-shape",
    "An alias whose shape isn't that of the packet it refers to.",
    lambda: block_header([Run(1, back=1, call=1)], [[1, 1]], 0),
    b"",
)
_block(
    "alias-of-another-dtype",
    "An alias whose dtype isn't that of the packet it refers to.",
    lambda: block_header([Run(1, back=1, call=1)], [[1]], 0, dtype=7),
    b"",
)
_block(
    "alias-of-another-pass",
    "An alias of a packet of another pass.",
    lambda: block_header([Run(1, 1, back=1, call=1)], [[1]], 0),
    b"",
)
_block(
    "alias-in-parts",
    "An alias that is part of a packet.",
    lambda: block_header([Run(1, back=1, call=1, part=0, parts=2)], [[1]], 0),
    b"",
)
_block(
    "seq-twice",
    "Two packets with one sequence number.",
    lambda: block_header([Run(0, call=1)], [[1]], 4),
)
_block(
    "seq-standing",
    "A run whose packets all have one sequence number.",
    lambda: block_header([Run(1, count=2)], [[1]], 8),
    ONE * 2,
)


@bad("An alias of a packet that isn't there.")
def alias_dangling() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    offset = log.block([Run(2, back=1, call=2)], [[1]])
    log.tensor(3, 2.0)
    log.commit(4, 1)
    log.close()
    return Bad(bytes(log.data), offset, [0], [0, 3])


@bad("An alias of an alias.")
def alias_of_alias() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.block([Run(1, back=1, call=1)], [[1]])
    offset = log.block([Run(2, back=1, call=2)], [[1]])
    log.commit(3, 1)
    log.tensor(3, 2.0)
    log.commit(4, 1)
    log.close()
    return Bad(bytes(log.data), offset, [0, 1], [0, 1, 3])


@bad("Parts that are together shorter than their shape.")
def parts_short() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    offset = log.block([Run(1, call=1, part=0, parts=2)], [[4]], bytes(8))
    log.block([Run(1, call=1, part=1, parts=2)], [[4]], bytes(4))
    log.tensor(2, 1.0)
    log.commit(3, 1)
    log.close()
    return Bad(bytes(log.data), offset, [0], [0, 2])


@bad("Parts of one packet that differ in their dtype.")
def parts_differ() -> Bad:
    log = begun()
    log.tensor(0, 1.0)
    log.block([Run(1, call=1, part=0, parts=2)], [[4]], bytes(8))
    offset = log.block([Run(1, call=1, part=1, parts=2)], [[4]], bytes(8), dtype=7)
    log.commit(2, 1)
    log.tensor(2, 1.0)
    log.commit(3, 1)
    log.close()
    return Bad(bytes(log.data), offset, [0], [0, 2])


@bad("Parts of one packet that are of two layers.")
def parts_of_two_layers() -> Bad:
    log = begun()
    log.layer(1, "other")
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.block([Run(1, part=0, parts=2)], [[4]], bytes(8))
    offset = log.block([Run(1, part=1, parts=2)], [[4]], bytes(8), layer=1)
    log.commit(2, 1)
    log.tensor(2, 1.0)
    log.commit(3, 1)
    log.close()
    return Bad(bytes(log.data), offset, [0], [0, 2])


def _codec(name: str, about: str, payload: bytes, raw_length: int = len(STAIRS)) -> None:
    def make() -> Bad:
        log = begun({"0": None, "1": LZ4})
        log.tensor(0, 1.0)
        log.commit(1, 1)
        offset = log.block(
            [Run(1, call=1)], [[raw_length // 4]], bytes(raw_length), payload, codec=1
        )
        log.tensor(2, 3.0)
        log.commit(3, 1)
        log.close()
        return Bad(bytes(log.data), offset, [0], [0, 2])

    BAD[name] = (about, make)


_codec(
    "blosc-raw-length-lies", "A Blosc frame of fewer bytes than the BLOCK says.", STAIRS_LZ4, 260
)
_codec("blosc-cut", "A Blosc frame that ends early.", STAIRS_LZ4[:-1])
_codec("blosc-long", "A Blosc frame with bytes behind it.", STAIRS_LZ4 + b"\x00")
_codec("blosc-short", "A Blosc frame of 15 bytes.", STAIRS_LZ4[:15])
_codec("blosc-garbage", "A Blosc frame whose content is none.", STAIRS_LZ4[:16] + b"\xff" * 73)

_amid(
    "frame-flags",
    "A frame with a flag.",
    lambda log: log.record(PAD, flags=1),
    closed=False,
)
_amid(
    "frame-reserved",
    "A frame whose reserved bytes aren't 0.",
    lambda log: log.record(PAD, reserved=256),
    closed=False,
)
_amid(
    "frame-header-limit",
    "A frame whose header is over 2^24 bytes.",
    lambda log: log.record(PAD, header_length=2**24 + 1),
    closed=False,
)
_amid(
    "frame-payload-limit",
    "A frame whose payload is over 2^30 bytes.",
    lambda log: log.record(PAD, payload_length=2**30 + 1),
    closed=False,
)
_amid(
    "frame-beyond-file",
    "A frame whose payload would end behind the file.",
    lambda log: log.record(PAD, payload_length=2**20),
    closed=False,
)
_amid(
    "layer-payload",
    "A LAYER with a payload.",
    lambda log: log.record(LAYER, document(log.expected["layers"][0] | {"id": 1}), b"x"),
)
_amid(
    "layer-twice",
    "Two layers with one id.",
    lambda log: log.record(LAYER, document(log.expected["layers"][0] | {"name": "other"})),
)
_amid(
    "layer-name-twice",
    "Two layers with one name.",
    lambda log: log.record(LAYER, document(log.expected["layers"][0] | {"id": 1})),
)
_amid("layer-incomplete", "A LAYER without a name.", lambda log: log.record(LAYER, b'{"id":1}'))
_amid("layer-no-json", "A LAYER that is no JSON.", lambda log: log.record(LAYER, b'{"id":'))
_amid(
    "features-count-lies",
    "A FEATURES with more indices than it holds.",
    lambda log: log.record(FEATURES, struct.pack("<II", 8, 3), struct.pack("<2I", 1, 2)),
)
_amid(
    "features-odd",
    "A FEATURES whose payload is no whole number of indices.",
    lambda log: log.record(FEATURES, struct.pack("<II", 8, 1), bytes(5)),
)
_amid(
    "features-beyond",
    "A FEATURES whose index is not below its width.",
    lambda log: log.record(FEATURES, struct.pack("<II", 2, 2), struct.pack("<2I", 1, 2)),
)
_amid(
    "features-order",
    "A FEATURES whose indices don't ascend.",
    lambda log: log.record(FEATURES, struct.pack("<II", 8, 2), struct.pack("<2I", 3, 3)),
)
_amid(
    "token-text-lies",
    "A TOKEN whose text is shorter than it says.",
    lambda log: log.record(TOKEN, struct.pack("<QqqqdI", 0, 1, 0, 0, 0.0, 2) + b"a"),
)
_amid(
    "token-text-no-utf8",
    "A TOKEN whose text isn't UTF-8.",
    lambda log: log.record(TOKEN, struct.pack("<QqqqdI", 0, 1, 0, 0, 0.0, 1) + b"\xff"),
)
_amid(
    "text-key",
    "A TEXT with a key that is no token id.",
    lambda log: log.record(TEXT, b'{"Paris":"5"}'),
)
_amid(
    "commit-boundary",
    "A COMMIT with a flag that means nothing.",
    lambda log: log.commit(1, 1, boundary=4),
    closed=False,
)


def _pass(name: str, about: str, header: bytes, payload: bytes = b"") -> None:
    def make() -> Bad:
        log = Log()
        log.commit(boundary=1)
        log.layer()
        offset = log.record(PASS, header, payload)
        log.commit(0, 1)
        log.close()
        return Bad(bytes(log.data), offset, [], [])

    BAD[name] = (about, make)


_EMPTY_AXIS = Axis("token", 1, 1, [0]).header()
_pass(
    "pass-axes-limit",
    "A PASS of 17 axes.",
    struct.pack("<QIIHBB", 0, 0, 0, 0, 17, 1) + _EMPTY_AXIS * 17,
    bytes(4 * 17),
)
_pass("pass-flags", "A PASS with a flag that isn't.", struct.pack("<QIIHBB", 0, 0, 0, 0, 0, 9))
_pass(
    "pass-rows-lie",
    "A PASS with an axis of 2^64 rows or so.",
    struct.pack("<QIIHBB", 0, 0, 0, 0, 1, 1)
    + struct.pack("<IIBBBBB", 2**32 - 1, 2**32 - 1, 0, 7, 0, 0, 0),
    bytes(4),
)
_pass(
    "pass-positions-dtype",
    "A PASS whose positions are float32.",
    struct.pack("<QIIHBB", 0, 0, 0, 0, 1, 1) + struct.pack("<IIBBBBB", 1, 1, 0, 12, 0, 0, 0),
    bytes(4),
)
_pass(
    "pass-payload-long",
    "A PASS whose payload goes on.",
    struct.pack("<QIIHBB", 0, 0, 0, 0, 1, 1) + _EMPTY_AXIS,
    bytes(5),
)
_pass(
    "pass-status-with-axes",
    "A PASS that says it is its status only, and has an axis.",
    struct.pack("<QIIHBB", 0, 0, 0, 0, 1, 5) + _EMPTY_AXIS,
    bytes(4),
)
