"""The logs that a reader must read: each function is a vector, named as it is."""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from building import (
    ABORTED,
    CLOSED,
    COMMIT,
    DTYPES,
    LAYER,
    MAGIC,
    PAD,
    SYNC,
    Axis,
    Log,
    Run,
    begun,
    document,
    frame,
)

#: numcodecs configurations.
LZ4 = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 2, "blocksize": 0}
ZSTD = {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1, "blocksize": 0}

#: 64 float32, 0 0 0 0 1 1 1 1 … 15 15 15 15, and what numcodecs 0.16.6 makes of them with `LZ4`
#: and `ZSTD`. Kept as bytes: other versions of the compressors may give others.
STAIRS = struct.pack("<64f", *(i // 4 for i in range(64)))
STAIRS_LZ4 = bytes.fromhex(
    "0201340400010000000100005900000014000000410000001f00010090f316f0f0f0f00000f0f000ff00ff00f000"
    "ff0000fffff000ffff00000000f0000000fffffffff0c8000f08000d012d00b0ffffff0000000000000000"
)
STAIRS_ZSTD = bytes.fromhex(
    "0201910400010000000100005f000000140000004700000028b52ffd600000ed010082440c0fe0e9d0050b727abd"
    "d4db9d9fcf5753c044446d7b776766565565db3333222211116d1b420899998888ff6fdb6dfbff6d0310008d14b5"
    "f9691b"
)


GOOD: dict[str, tuple[str, Callable[[], Log]]] = {}


def good(about: str) -> Callable[[Callable[[], Log]], Callable[[], Log]]:
    """Register a good vector; it is named as the function is."""

    def register(make: Callable[[], Log]) -> Callable[[], Log]:
        GOOD[make.__name__.replace("_", "-")] = (about, make)
        return make

    return register


@good("A log of nothing whose writer died: magic, HEADER, the first COMMIT.")
def empty_unclosed() -> Log:
    log = Log()
    log.commit(boundary=1)
    return log


@good("A log of nothing, closed.")
def empty_closed() -> Log:
    log = empty_unclosed()
    log.close()
    return log


@good("Its writer died before the first COMMIT: a log of nothing.")
def header_alone() -> Log:
    return Log()


@good("Members of the HEADER and of a LAYER that a reader doesn't know; a summary.")
def unknown_members() -> Log:
    log = Log(writer={"name": "make.py", "version": "0", "mood": 1}, colour=["blue", None, 1.5])
    log.commit(boundary=1)
    info = {"id": 0, "name": "layer", "site": "layer", "block": -1, "class": "Linear"}
    log.record(LAYER, document(info | {"colour": {"is": "blue"}}))
    log.expected["layers"].append(info)
    log.pass_()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.close({"packets": 1})
    return log


@good("A process of several: its place in the HEADER, and its part of a layer.")
def one_of_several() -> Log:
    mesh = {"run": "a run", "data": [0, 1], "pipeline": [0, 1], "tensor": [1, 2]}
    log = Log(parallel=mesh)
    log.commit(boundary=1)
    info = {"id": 0, "name": "layer", "site": "layer", "block": -1, "class": "Linear"}
    log.record(LAYER, document(info | {"shard": {"dim": -1, "offset": 3, "size": 5}}))
    log.expected["layers"].append(info)
    log.pass_()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.close()
    return log


@good("Raw float32 of three shapes: (2, 3), a scalar, and one with no elements.")
def raw_float32() -> Log:
    log = begun()
    values = struct.pack("<7f", 0.0, -0.0, 1.5, float("inf"), float("nan"), 1e-45, 2.0)
    log.block(
        [Run(0), Run(1, call=1, shape=1), Run(2, call=2, shape=2)], [[2, 3], [], [0, 4]], values
    )
    log.expect(0, [2, 3], values[:24])
    log.expect(1, [], values[24:], call=1)
    log.expect(2, [0, 4], b"", call=2)
    log.commit(3, 1)
    log.close()
    return log


@good("Each dtype: a block of two elements of it.")
def dtypes() -> Log:
    log = Log()
    log.commit(boundary=1)
    log.pass_()
    for seq, (code, name, itemsize) in enumerate(DTYPES):
        raw = b"\x01\x00" if name == "bool" else bytes(range(0x3B, 0x3B + 2 * itemsize))
        log.layer(seq, name)
        log.block([Run(seq)], [[2]], raw, layer=seq, dtype=code)
        log.expect(seq, [2], raw, layer=name, dtype=code)
    log.commit(len(DTYPES), 1)
    log.close()
    return log


@good("Blosc LZ4 with bit-shuffle.")
def lz4() -> Log:
    return _stairs(LZ4, STAIRS_LZ4)


@good("Blosc zstd with shuffle, as the library writes it.")
def zstd() -> Log:
    return _stairs(ZSTD, STAIRS_ZSTD)


@good("Blosc zstd with shuffle of 512 float32 in one split block: a frame for each byte plane.")
def zstd_planes() -> Log:
    values = struct.pack("<512f", *([1.0] * 500 + [float(i) for i in range(12)]))
    log = begun({"0": None, "2": ZSTD})
    log.block([Run(0)], [[512]], values, plane_split(values, 4), codec=2)
    log.expect(0, [512], values)
    log.commit(1, 1)
    log.close()
    return log


def plane_split(values: bytes, itemsize: int) -> bytes:
    """Give a Blosc frame of one block, split: of each byte plane the length, and a zstd frame."""
    streams = b""
    for plane in (values[i::itemsize] for i in range(itemsize)):
        packed = zstd_frame(plane)
        packed = packed if len(packed) < len(plane) else plane
        streams += struct.pack("<i", len(packed)) + packed
    total = 16 + 4 + len(streams)
    head = struct.pack("<BBBBIII", 2, 1, 0x81, itemsize, len(values), len(values), total)
    return head + struct.pack("<i", 20) + streams


def zstd_frame(plane: bytes) -> bytes:
    """Give a zstd frame of a run of one byte, then the rest as it is."""
    run = len(plane) - len(plane.lstrip(plane[:1]))
    head = struct.pack("<IBH", 0xFD2FB528, 0x60, len(plane) - 256)  # single segment, u16 size
    last = int(run == len(plane))
    blocks = (last | 1 << 1 | run << 3).to_bytes(3, "little") + plane[:1]
    if not last:
        blocks += (1 | (len(plane) - run) << 3).to_bytes(3, "little") + plane[run:]
    return head + blocks


def _stairs(codec: Mapping[str, Any], payload: bytes) -> Log:
    log = begun({"7": codec})
    runs = [Run(0, count=4, seq_step=2, call_step=1), Run(8, call=4, shape=1)]
    log.block(runs, [[3, 4], [16]], STAIRS, payload, codec=7)
    for i in range(4):
        log.expect(2 * i, [3, 4], STAIRS[48 * i : 48 * (i + 1)], call=i)
    log.expect(8, [16], STAIRS[192:], call=4)
    log.commit(9, 1)
    log.close()
    return log


@good("A packet in three parts of one group, with another layer's packet between them.")
def parts() -> Log:
    log = begun()
    log.layer(1, "other")
    values = struct.pack("<10f", *range(10))
    log.block([Run(0, part=0, parts=3)], [[5, 2]], values[:16])
    log.block([Run(0, part=1, parts=3)], [[5, 2]], values[16:18])
    log.block([Run(1)], [[1]], values[:4], layer=1)
    log.block([Run(0, part=2, parts=3)], [[5, 2]], values[18:])
    log.expect(0, [5, 2], values)
    log.expect(1, [1], values[:4], layer="other")
    log.commit(2, 1)
    log.close()
    return log


@good("A packet in parts that stand in two groups, and an alias of it.")
def parts_across_groups() -> Log:
    log = begun()
    log.layer(1, "other")
    values = struct.pack("<4f", *range(4))
    log.block([Run(0, part=0, parts=2)], [[4]], values[:12])
    log.commit(0, 1)
    log.block([Run(0, part=1, parts=2)], [[4]], values[12:])
    log.block([Run(1, back=1)], [[4]], layer=1)
    log.expect(0, [4], values)
    log.expect(1, [4], values, layer="other")
    log.commit(2, 1)
    log.close()
    return log


@good("Its writer died between a packet's parts: the packet is not there.")
def parts_unfinished() -> Log:
    log = begun()
    log.tensor(0, 1.0, 2.0)
    log.block([Run(1, call=1, part=0, parts=2)], [[4]], bytes(12))
    log.commit(1, 1)
    log.block([Run(1, call=1, part=1, parts=2)], [[4]], bytes(4))
    return log


@good("Aliases: of a packet of this group and of one before, single and in runs.")
def aliases() -> Log:
    log = begun()
    log.layer(1, "outer")
    log.layer(2, "outermost")
    raw = struct.pack("<6f", *range(6))
    log.block([Run(0, count=3, seq_step=3, call_step=1)], [[2]], raw)
    log.block([Run(1, back=1, count=3, seq_step=3, call_step=1)], [[2]], layer=1)
    log.block([Run(2, back=2), Run(5, back=2, call=1)], [[2]], layer=2)
    log.commit(8, 1)
    log.block([Run(8, back=2, call=2), Run(9, call=3)], [[2]], raw[:8], layer=2)
    for seq in range(3):
        for call in range(3):
            name, values = ("layer", "outer", "outermost")[seq], raw[8 * call : 8 * call + 8]
            log.expect(seq + 3 * call, [2], values, layer=name, call=call)
    log.expect(9, [2], raw[:8], layer="outermost", call=3)
    log.commit(10, 1)
    log.close()
    return log


@good("Sampled features: of tensors of width 8, three features; of width 4, two.")
def sampled_features() -> Log:
    log = begun()
    log.features(8, [0, 3, 7])
    log.features(4, [1, 2])
    raw = struct.pack("<6f", *range(6))
    log.block([Run(0)], [[2, 3]], raw, width=8)
    log.block([Run(1, call=1)], [[2, 2]], raw[:16], width=4)
    log.expect(0, [2, 3], raw)
    log.expect(1, [2, 2], raw[:16], call=1)
    log.commit(2, 1)
    log.close()
    return log


@good("Axes: a padded mask, int64 ids and positions, flat, two axes, no ids, no rows, no axis.")
def axes() -> Log:
    log = Log()
    log.commit(boundary=1)
    mask = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    log.pass_(0, [Axis("token", 2, 5, [*range(5)] * 2, [*range(10, 20)], mask)])
    large = [2**40, -(2**40)]
    log.pass_(1, [Axis("token", 1, 2, large, large[::-1], position_code=9, id_code=9)])
    log.pass_(2, [Axis("token", 2, 2, [0, 1, 0, 1], [5, 6, 7, 8], flat=1)])
    encoder = Axis("encoder_token", 1, 3, [0, 1, 2], [4, 5, 6], [1, 1, 0])
    log.pass_(3, [encoder, Axis("decoder_token", 1, 1, [0], [1])], entry="model.décodeur")
    log.pass_(4, [Axis("token", 1, 2, [7, 8])], keep=1)
    log.pass_(5, [Axis("token", 3, 0, [], [], [])])
    log.pass_(6)
    log.commit(0, 7)
    log.close()
    return log


@good("Annotations: labels of a pass's batch items.")
def annotations() -> Log:
    log = Log()
    log.commit(boundary=1)
    labels = {"sample_id": [7, None], "prompt": ["«Paris»", "\ud83d"], "weight": [0.5, -1e300]}
    log.pass_(0, [Axis("token", 2, 1, [0, 0], [1, 2])], annotations=labels)
    log.commit(0, 1)
    log.close()
    return log


@good("Tokens: without a position, with one, with lone surrogates, before any pass; their texts.")
def tokens() -> Log:
    log = Log()
    log.commit(boundary=1)
    log.token(0, 5, " Paris")
    log.pass_(0, [Axis("token", 1, 2, [0, 1], [5, 6])])
    log.texts({"5": " Paris", "6": "\ud83d", "7": "old"})
    log.token(1, -7, "\ude00\ud83d", position=-1, pass_index=0, time=1.7e9)
    log.texts({"7": "new"})
    log.token(2, 2**62, "", position=2**62, pass_index=0, time=1.7e9 + 0.25)
    log.commit(0, 1, 3, boundary=1, synced=1)
    log.close()
    return log


@good("How passes ended: in their group, later, by raising, or with the log.")
def pass_status() -> Log:
    log = Log()
    log.commit(boundary=1)
    axis = Axis("token", 1, 1, [0], [1])
    log.pass_(0, [axis])
    log.pass_(1, [axis], flags=CLOSED | ABORTED)
    log.pass_(2, [axis], flags=0, annotations={"label": [1]})
    log.commit(0, 3)
    log.pass_ends(2, CLOSED)
    log.pass_(3, [axis], flags=0)
    log.commit(0, 4)
    log.pass_ends(3, CLOSED | ABORTED)
    log.pass_(4, [axis], flags=0)
    log.commit(0, 5)
    return log


@good("A pass whose second axis became known in a later group: the later PASS is what counts.")
def pass_again() -> Log:
    log = Log()
    log.commit(boundary=1)
    decoder, encoder = Axis("decoder_token", 1, 1, [0], [7]), Axis("encoder_token", 1, 2, [0, 1])
    log.pass_(0, [decoder], flags=0)
    log.expected["passes"].clear()
    log.commit(0, 1)
    log.pass_(0, [encoder, decoder], flags=0, annotations={"label": [1]})
    log.commit(0, 1)
    log.pass_ends(0, CLOSED)
    log.commit(0, 1)
    return log


@good("PADs between records, before a COMMIT and after one, of no bytes and of many.")
def pad() -> Log:
    log = begun()
    log.record(PAD)
    log.tensor(0, 1.0)
    log.record(PAD, payload=bytes(100))
    log.commit(1, 1)
    log.record(PAD, payload=bytes(1))
    log.tensor(1, 2.0)
    log.commit(2, 1)
    log.close()
    return log


@good("Opcodes that a reader doesn't know, reserved and private; one not committed.")
def unknown_opcodes() -> Log:
    log = begun()
    log.record(0x0C, b"header", b"payload")
    log.tensor(0, 1.0)
    log.record(0x80, b"", b"\x00")
    log.record(0xFF)
    log.record(0x00)
    log.commit(1, 1)
    log.record(0x7F, b"header")
    return log


@good("A payload that holds the sync marker, a whole record and a whole log.")
def marker_in_payload() -> Log:
    log = begun()
    inner = raw_float32().data
    raw = SYNC + bytes(4) + SYNC[:7] + frame(COMMIT, b"", b"") + inner + bytes(-len(inner) % 4)
    raw += bytes(-len(raw) % 4)
    log.block([Run(0)], [[len(raw)]], raw, dtype=2)
    log.expect(0, [len(raw)], raw, dtype=2)
    log.tensor(1, 1.0)
    log.commit(2, 1)
    return log


@good("Three groups; in each, the blocks of two layers whose packets alternate.")
def groups() -> Log:
    log = begun()
    log.layer(1, "other")
    for group in range(3):
        raw = struct.pack("<6f", *range(6 * group, 6 * group + 6))
        first = 6 * group
        if group:
            log.pass_(group)
        run = Run(first, group, count=3, seq_step=2, call_step=1)
        log.block([run], [[1]], raw[:12])
        log.block([run._replace(seq=first + 1)], [[1]], raw[12:], layer=1)
        for call in range(3):
            for layer, name in enumerate(("layer", "other")):
                place = 12 * layer + 4 * call
                log.expect(
                    first + 2 * call + layer,
                    [1],
                    raw[place : place + 4],
                    layer=name,
                    pass_index=group,
                    call=call,
                )
        log.commit(first + 6, group + 1)
    log.close()
    return log


@good("A prefill and four decoded tokens: three layers, one an alias, as runs over passes.")
def decode() -> Log:
    log = Log()
    log.commit(boundary=1)
    names = ("mlp", "block", "norm")
    for number, name in enumerate(names):
        log.layer(number, name, block=0 if number < 2 else -1)
    lengths = [3, 1, 1, 1, 1]
    for index, length in enumerate(lengths):
        start = sum(lengths[:index])
        places = [*range(start, start + length)]
        log.pass_(index, [Axis("token", 1, length, places, [100 + place for place in places])])
        log.token(index, 100 + start + length, f" t{index}", pass_index=index)
    shapes = [[1, 3, 2], [1, 1, 2]]
    for number, name in enumerate(names):
        values = [1000.0 * number + i for i in range(2 * sum(lengths))]
        back, raw = int(name == "block"), struct.pack(f"<{len(values)}f", *values)
        runs = [
            Run(number, back=back),
            Run(3 + number, 1, back, count=4, seq_step=3, pass_step=1, shape=1),
        ]
        log.block(runs, shapes, b"" if back else raw, layer=number)
        source = raw if not back else struct.pack("<14f", *range(14))
        at = 0
        for index, length in enumerate(lengths):
            shape, size = shapes[min(index, 1)], 8 * length
            log.expect(
                3 * index + number, shape, source[at : at + size], layer=name, pass_index=index
            )
            at += size
    log.commit(15, 5, 5, boundary=1)
    log.close()
    return log


def _torn(name: str, about: str, place: Callable[[list[int]], int], packets: int) -> None:
    """Register a log that was cut: `place` says where, given where its records begin."""

    def make() -> Log:
        log = begun()
        log.tensor(0, 1.0, 2.0)
        log.commit(1, 1)
        offsets = [log.tensor(1, 3.0, 4.0), log.commit(2, 1), len(log.data)]
        log.close({"packets": 2})
        offsets += [log.data.rindex(SYNC), len(log.data) - len(MAGIC), len(log.data)]
        del log.data[place(offsets) :]
        log.expected["packets"] = log.expected["packets"][:packets]
        log.expected["complete"] = False
        return log

    GOOD[f"torn-{name}"] = (about, make)


_torn("at-commit", "Cut behind a COMMIT.", lambda at: at[0], 1)
_torn("in-sync", "Cut in the sync marker of a BLOCK.", lambda at: at[0] + 5, 1)
_torn("in-frame", "Cut in the frame of a BLOCK.", lambda at: at[0] + 39, 1)
_torn("in-header", "Cut in the header of a BLOCK.", lambda at: at[0] + 60, 1)
_torn("in-payload", "Cut in the payload of a BLOCK.", lambda at: at[1] - 1, 1)
_torn("before-commit", "Cut before a COMMIT.", lambda at: at[1], 1)
_torn("in-commit", "Cut in the directory of a COMMIT.", lambda at: at[2] - 1, 1)
_torn("before-index", "Cut before the INDEX.", lambda at: at[2], 2)
_torn("in-index", "Cut in the payload of the INDEX.", lambda at: at[3] - 1, 2)
_torn("before-end", "Cut before the END.", lambda at: at[3], 2)
_torn("before-magic", "Cut before the last magic.", lambda at: at[4], 2)
_torn("in-magic", "Cut in the last magic.", lambda at: at[5] - 1, 2)


@good("A torn tail of zeros, as a file system may leave it.")
def torn_zeros() -> Log:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.data += bytes(300)
    return log


@good("A torn tail whose BLOCK and COMMIT are there, but for a flipped bit of the COMMIT.")
def torn_flipped_commit() -> Log:
    log = begun()
    log.tensor(0, 1.0)
    log.commit(1, 1)
    log.tensor(1, 2.0)
    log.expected["packets"].pop()
    log.data[log.commit(2, 1) + 45] ^= 1
    return log
