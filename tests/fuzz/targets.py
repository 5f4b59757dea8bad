"""What is fuzzed: everything that reads a log, an older log, or the JSON files beside one.

The corpus is the vectors of `schemas/vectors`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final

import legacy_pieces
import log_pieces
import xarray as xr
from limits import Target, folder, steady_heap, warm_up
from log_pieces import Piece, mutate_log
from mutations import mutate_bytes, mutate_json
from numcodecs import blosc

from actstore import (
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    analyze_activations_with_tokens,
    codecs,
    open_dataset,
    open_stream,
    recover,
    verify,
)
from actstore.errors import ActstoreError
from actstore.stream import records, sidecars
from actstore.stream.legacy import LegacyReader

PACKETS: Final = 200  # read of each log; all of them are counted, verified and recovered
_STACK: Final = 9 << 20  # bytes of address space of a thread
_place = folder()
_path = _place / "fuzzed.stream"
_old = _place / "old.stream"
_framework = InstrumentationFramework(InstrumentationConfig(HookGranularity.FULL_TENSOR))


# -- records --------------------------------------------------------------------------------------

_DECODERS: Final[dict[int, Callable[[bytes, bytes], Any]]] = {
    log_pieces.HEADER: lambda header, payload: records.Header.decode(header),
    log_pieces.LAYER: lambda header, payload: records.Layer.decode(header),
    log_pieces.FEATURES: records.Features.decode,
    log_pieces.PASS: lambda header, payload: (
        records.Pass.peek(header),
        records.Pass.decode(header, payload),
    ),
    log_pieces.BLOCK: lambda header, payload: _decode_block(header, payload),
    log_pieces.TOKEN: lambda header, payload: records.Token.decode(header),
    log_pieces.COMMIT: lambda header, payload: (
        records.Commit.decode(header),
        list(records.decode_entries(payload)),
    ),
    log_pieces.INDEX: records.Index.decode,
    log_pieces.END: lambda header, payload: records.decode_end(header),
    log_pieces.TEXT: lambda header, payload: records.Text.decode(header),
}


def decode_record(data: bytes) -> str:
    """Decode a record: its opcode, the length of its header, then header and payload."""
    if len(data) < 5:
        return "short"
    opcode, length = data[0] % 12, int.from_bytes(data[1:5], "little")
    if opcode not in _DECODERS:
        records.Frame.decode(data[5:])
        return "frame"
    found = _DECODERS[opcode](data[5 : 5 + length], data[5 + length :])
    return f"{opcode} {type(found).__name__}"


def _decode_block(header: bytes, payload: bytes) -> int:
    block = records.Block.decode(header)
    for number in block.codec % 3, 1:
        with suppress(ActstoreError):
            codecs.decode(codecs.CODECS[number], payload, block.raw_length)
    return block.codec


def mutate_packed(data: bytes, rng: Random) -> bytes:
    """Change a record as records are changed in a log."""
    if len(data) < 5 or rng.randrange(6) == 0:
        return mutate_bytes(data, rng)
    if rng.randrange(20) == 0:
        return packed(log_pieces.odd_block(b"", rng)[0])
    length = int.from_bytes(data[1:5], "little")
    piece = Piece(data[0] % 12, data[5 : 5 + length], data[5 + length :])
    return packed(log_pieces.mutate_record(piece, rng))


def packed(piece: Piece) -> bytes:
    """Give a record as `decode_record` takes it."""
    return struct.pack("<BI", piece.opcode % 12, len(piece.header)) + piece.header + piece.payload


def _packed_vectors() -> tuple[bytes, ...]:
    pieces = (one for log in log_pieces.vectors() for one in log_pieces.taken_apart(log)[1])
    return tuple(dict.fromkeys(map(packed, pieces)))


# -- logs -----------------------------------------------------------------------------------------


def read_log(data: bytes) -> str:
    """Read a log up to its damage."""
    _path.write_bytes(data)
    with open_stream(_path) as reader:
        found = read(reader)
        reader.check()
        return found


def skip_damage(data: bytes) -> str:
    """Read all of a log that is intact."""
    _path.write_bytes(data)
    with open_stream(_path, errors="skip") as reader:
        return read(reader)


def read(reader: Any) -> str:
    """Read a log in every way that reading has."""
    repr(reader)
    passes = len(reader.passes)
    packets = sum(packet.values.nbytes >= 0 for packet in islice(reader.packets(), PACKETS))
    for name in islice(reader.layers, 3):
        next(reader.packets(name), None)
    return f"{packets} packets, {passes} passes, {min(len(reader.damage), 3)} damaged"


def read_header(data: bytes) -> str:
    """Read a log whose HEADER is this JSON."""
    vector = log_pieces.VECTORS / "good" / "lz4.stream"
    sync, pieces = log_pieces.taken_apart(vector.read_bytes())
    log = log_pieces.put_together(sync, [Piece(log_pieces.HEADER, data), *pieces[1:-1]])
    found = read_log(log + log_pieces.MAGIC)
    return f"{found} {analyze(log + log_pieces.MAGIC)} {read_dataset(log + log_pieces.MAGIC)}"


def verify_log(data: bytes) -> str:
    """Verify a log, by its checksums and by decoding."""
    _path.write_bytes(data)
    report = verify(_path)
    decoded = verify(_path, decode=True)
    assert report.ok >= decoded.ok
    return f"{report.ok} {sorted({one.where for one in decoded.damage})} {len(report.checked)}"


def recover_log(data: bytes) -> str:
    """Make a whole log of what is intact; what was made is one."""
    _path.write_bytes(data)
    made = _place / "made.stream"
    try:
        report = recover(_path, made)
        str(report)
        if made.exists():
            with open_stream(made) as reader:
                assert reader.complete
                assert reader.packet_count == report.packets
            assert recover(made).recovered == made
        return f"{report.whole} {min(report.packets, 9)} {min(report.lost_packets, 9)}"
    finally:
        made.unlink(missing_ok=True)


def analyze(data: bytes) -> str:
    """Count what a log holds, by layer and by token."""
    _path.write_bytes(data)
    found = analyze_activations_with_tokens(_path, _framework)
    return f"{sorted(found)} {found['compression']}"[:200]


def read_dataset(data: bytes) -> str:
    """Open a log as a dataset, and read a little of each variable."""
    _path.write_bytes(data)
    with open_dataset(_path, chunks=None) as opened:
        return _read_a_little(opened)


def _read_a_little(opened: xr.Dataset) -> str:
    for name in islice(opened.variables, 60):
        one = opened[name]
        for picked in ({}, dict.fromkeys(one.dims, -1)) if one.size else ():
            few = {dim: picked.get(dim, slice(0, 2)) for dim in one.dims}
            assert one.isel(few).values.size <= one.size
    return f"{sorted(map(str, opened.data_vars))[:5]} {len(opened.sizes)}"


# -- logs of llm-instrumentation ------------------------------------------------------------------


def read_old(data: bytes) -> str:
    """Read such a log, whatever its damage; also with shapes that fit or don't."""
    _old.write_bytes(data)
    with LegacyReader(_old, errors="skip") as reader:
        found = read(reader)
    told = dict.fromkeys(islice(reader.layers, 2), (1, -1, 2))
    with suppress(ActstoreError), LegacyReader(_old, shapes=told) as reader:
        found += read(reader)
    return found


def open_old(data: bytes) -> str:
    """Verify and analyse such a log, and open it as a dataset."""
    _old.write_bytes(data)
    report = verify(_old)
    found = analyze_activations_with_tokens(_old, _framework)
    with open_dataset(_old, chunks=None) as opened:
        return f"{report.ok} {found['compression']} {_read_a_little(opened)}"


# -- JSON -----------------------------------------------------------------------------------------


def read_checkpoint(data: bytes) -> str:
    """Read a checkpoint."""
    place = sidecars.checkpoint_name(_place / "none.stream")
    place.write_bytes(data)
    found = sidecars.Checkpoint.read(place)
    return f"{min(len(found.tokens), 4)} tokens"


def read_tokens(data: bytes) -> str:
    """Read a token table beside a log that has tokens itself, and beside an older one."""
    log = _tracked()
    sidecars.tokens_name(log).write_bytes(data)
    with open_stream(log) as reader:
        found = sidecars.token_metadata(reader)
        assert found is not None
        said = [one["token_id"] for one in found["tokens"]]
        assert said == [one.token_id for one in reader.tokens]
    old = _place / "tokens.stream"
    sidecars.tokens_name(old).write_bytes(data)
    with LegacyReader(old) as other:
        known = len(sidecars.token_metadata(other) or ())
    return f"resumed {min(sidecars.resume_count(log), 4)}, {min(len(other.tokens), 4)} {known}"


@cache
def _tracked() -> Path:
    """Give a log of ours that has tokens, beside one of llm-instrumentation."""
    vectors = log_pieces.VECTORS
    (_place / "tokens.stream").write_bytes((vectors / "legacy" / "none.stream").read_bytes())
    log = _place / "tracked.stream"
    log.write_bytes((vectors / "good" / "tokens.stream").read_bytes())
    return log


@cache
def documents() -> tuple[bytes, ...]:
    """Give a checkpoint and a token table as they are written, and older and hostile ones."""
    with open_stream(_tracked()) as reader:
        tokens = [sidecars.token_dict(record) for record in reader.tokens]
    plain = [
        {name: one[name] for name in ("token_index", "token_id", "token_text")} for one in tokens
    ]
    table = {"total_tokens": len(tokens), "tokens": tokens}
    found: list[Any] = [
        {"version": 1, "tokens": tokens, "metadata": {"start_time": 1.5, "resume_count": 2}},
        {"version": 1, "tokens": plain},
        {"version": 2, "tokens": []},
        table | {"metadata": {"resume_count": 1}},
        table | {"capture_duration_seconds": 1.0},
        {},
        [],
    ]
    written = [json.dumps(one).encode() for one in found]
    return (
        *written,
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5_000,
        b"\xff\xfe",
        b"\x00" * 9,
    )


def _headers() -> tuple[bytes, ...]:
    pieces = [log_pieces.taken_apart(log)[1] for log in log_pieces.vectors()]
    found = [one[0].header for one in pieces if one and one[0].opcode == log_pieces.HEADER]
    found.append(b'{"codecs":{"0":null,"1":{"id":"blosc"}},"capture":{"track_per_token":true}}')
    return (*dict.fromkeys(found), *documents()[-6:])


# -- what they may cost ---------------------------------------------------------------------------


def raw_lengths(data: bytes) -> int:
    """Give the bytes that a log's blocks validly declare: to read them may cost as much."""
    total = 0
    for piece in log_pieces.taken_apart(data)[1]:
        if piece.opcode == log_pieces.BLOCK and len(piece.header) >= log_pieces.BLOCK_HEAD.size:
            raw = log_pieces.BLOCK_HEAD.unpack_from(piece.header)[5]
            total += raw if raw <= records.BLOCK_LIMIT else 0
    return total


def packets(data: bytes) -> int:
    """Give the packets that a log's blocks validly declare, and that a reader takes."""
    total = 0
    for piece in log_pieces.taken_apart(data)[1]:
        if piece.opcode == log_pieces.BLOCK:
            with suppress(ActstoreError):
                total += sum(run.count for run in records.Block.decode(piece.header).runs)
    return min(total, records.PACKETS_LIMIT + len(data))


def _threads(data: bytes) -> int:
    """Give what verifying may cost: beside values, the stacks of its threads."""
    return raw_lengths(data) + (os.cpu_count() or 1) * _STACK


def _twice(data: bytes) -> int:
    """Give what recovering may cost: it compares what it wrote with what it read."""
    return 2 * raw_lengths(data)


def _values(data: bytes) -> int:
    """Give what datasets may cost: values are decoded, and copied in the dtype that they get."""
    return 3 * raw_lengths(data)


def _old_values(data: bytes) -> int:
    """Give what the frames of an older log say truly that comes out of them."""
    found = 0
    for _, payload in legacy_pieces.taken_apart(data):
        found += legacy_pieces.decoded(payload)
    return found


def targets() -> dict[str, Target]:
    """Give all of them, each run once: what is imported when first needed is no input's cost."""
    steady_heap()
    blosc.use_threads = False  # a thread takes address space, which is what is limited
    logs, old = log_pieces.vectors(), legacy_pieces.vectors()
    known = (
        Target("records", decode_record, mutate_packed, _packed_vectors(), lambda data: 1 << 24),
        Target("reader", read_log, mutate_log, logs, raw_lengths, packets),
        Target("skip", skip_damage, mutate_log, logs, raw_lengths, packets),
        Target("header", read_header, mutate_json, _headers()),
        Target("verify", verify_log, mutate_log, logs, _threads, packets),
        Target("recover", recover_log, mutate_log, logs, _twice, packets),
        Target("analyze", analyze, mutate_log, logs, packets=packets),
        Target("dataset", read_dataset, mutate_log, logs, _values, packets),
        Target("legacy", read_old, legacy_pieces.mutate, old, _old_values),
        Target("legacy-opened", open_old, legacy_pieces.mutate, old, _old_values),
        Target("checkpoint", read_checkpoint, mutate_json, documents()),
        Target("tokens", read_tokens, mutate_json, documents()),
    )
    for target in known:
        for data in target.corpus:
            warm_up(target, data)
    return {target.name: target for target in known}
