"""A second reader of the `.stream` log, from schemas/stream.md alone, without actstore.

It walks the frames and looks at no directory and no INDEX; what it finds wrong is a ValueError.
CRC-32C is the `crc32c` package's (schemas/vectors/make.py has its own).
"""

import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crc32c
import numcodecs

MAGIC = b"\x89ACS\r\n\x1a\x01"
LAYER, FEATURES, PASS, BLOCK, TOKEN, COMMIT, PAD, INDEX, END, TEXT = range(2, 12)
DTYPES = """0:0 bool:1 uint8:1 int8:1 uint16:2 int16:2 uint32:4 int32:4 uint64:8 int64:8 float16:2
    bfloat16:2 float32:4 float64:8 complex64:8 complex128:16 float8_e4m3fn:1 float8_e5m2:1
    float8_e4m3fnuz:1 float8_e5m2fnuz:1 float8_e8m0fnu:1"""
Fields = dict[str, Any]


def check(fact: bool, message: str) -> None:
    if not fact:
        raise ValueError(message)


class Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, length: int | None = None) -> bytes:
        start, self.at = self.at, len(self.data) if length is None else self.at + length
        check(self.at <= len(self.data), "shorter than its fields say")
        return self.data[start : self.at]

    def fields(self, layout: str) -> Fields:
        types, names = "<" + "".join(layout.split()[::2]), layout.split()[1::2]
        values = struct.unpack(types, self.take(struct.calcsize(types)))
        return dict(zip(names, values, strict=True))

    def integers(self, dtype: int, count: int) -> list[int]:
        kind = {6: "<I", 7: "<i", 9: "<q"}[dtype]
        return [i for (i,) in struct.iter_unpack(kind, self.take(struct.calcsize(kind) * count))]

    def text(self, length: int) -> str:
        return self.take(length).decode("utf-8", "surrogatepass")


def frame(data: bytes, at: int) -> Fields | None:
    """Give the record at `at`; None where there is no whole one."""
    if data[at : at + 16] != data[8:24] or at + 40 > len(data):
        return None
    f = Cursor(data[at + 16 : at + 40]).fields("B opcode B flags H zero I hl Q pl I body I head")
    middle, end = at + 40 + f["hl"], at + 40 + f["hl"] + f["pl"]
    sound = f["hl"] <= 2**24 and f["pl"] <= 2**30 and end <= len(data)
    if not sound or crc32c.crc32c(data[at : at + 36] + data[at + 40 : middle]) != f["head"]:
        return None
    check(f["flags"] == f["zero"] == 0, f"flags or reserved bytes at {at}")
    f["intact"] = crc32c.crc32c(data[middle:end]) == f["body"]
    return f | {"header": data[at + 40 : middle], "payload": data[middle:end], "end": end}


def read_pass(head: Cursor, body: Cursor) -> Fields:
    p = head.fields("Q index I logits_to_keep I notes H entry B axes B flags")
    p["entry"], axes = head.text(p["entry"]), []
    for _ in range(p["axes"]):
        axis = head.fields("I batch I sequence B flat B positions B ids B mask B name")
        axis["name"], rows = head.text(axis["name"]), axis["batch"] * axis["sequence"]
        axis["positions"] = body.integers(axis["positions"], rows)
        axis["ids"] = body.integers(axis["ids"], rows) if axis["ids"] else [-1] * rows
        bits = body.take((rows + 7) // 8) if axis["mask"] else b"\xff" * rows
        axes.append(axis | {"mask": [bits[i // 8] >> i % 8 & 1 == 1 for i in range(rows)]})
    p |= {"closed": bool(p["flags"] & 1), "aborted": bool(p["flags"] & 2), "axes": axes}
    return p | {"annotations": json.loads(body.take(p.pop("notes")) or "{}")}


def read_block(head: Cursor, body: Cursor, codecs: Fields) -> Iterator[Fields]:
    b = head.fields("I layer B codec B dtype H zero I width I raw_length I shapes I runs")
    shapes = [[head.fields("Q n")["n"] for _ in range(*head.take(1))] for _ in range(b["shapes"])]
    config, raw = codecs[str(b["codec"])], body.take()
    if config is not None and b["raw_length"]:
        check(config["id"] == "blosc", "a codec that isn't allowed")
        raw = bytes(numcodecs.get_codec(config).decode(raw))
    (b["dtype"], itemsize), values = DTYPES.split()[b["dtype"]].split(":"), Cursor(raw)
    for _ in range(b["runs"]):
        run = head.fields("Q seq Q pass Q alias_back I count I seq_step I pass_step I call")
        run |= head.fields("I call_step H shape H part H parts H reserved")
        run["shape"] = shapes[run["shape"]]
        run["size"] = int(itemsize) * math.prod(run["shape"])
        length = 0 if run["alias_back"] else run["size"] if run["parts"] == 1 else len(raw)
        for i in range(run["count"]):
            steps = {name: run[name] + i * run[name + "_step"] for name in ("seq", "pass", "call")}
            yield b | run | steps | {"bytes": values.take(length)}
    check(values.at == len(raw) == b["raw_length"], "a block's values don't fill its raw_length")


def assemble(packets: dict[int, list[Fields]], names: dict[int, str]) -> Iterator[Fields]:
    values = {}
    for seq, parts in sorted(packets.items()):
        parts.sort(key=lambda p: p["part"])
        if [p["part"] for p in parts] != [*range(parts[0]["parts"])]:
            continue  # its writer died between its parts
        back, whole = parts[0]["alias_back"], b"".join(p["bytes"] for p in parts)
        values[seq] = values[seq - back] if back else whole
        check(len(values[seq]) == parts[0]["size"], f"the values of {seq} don't fit its shape")
        yield parts[0] | {"layer": names[parts[0]["layer"]], "bytes": values[seq]}


def having(records: list[Fields], opcode: int) -> Iterator[tuple[Cursor, Cursor]]:
    for r in (r for r in records if r["opcode"] == opcode):
        head, body = Cursor(r["header"]), Cursor(r["payload"])
        yield head, body
        check(not head.take() and not body.take(), "longer than its fields say")


def read(path: str | Path) -> Fields:
    data, at, records, passes, packets = Path(path).read_bytes(), 8, [], {}, {}
    check(data[:8] == MAGIC, "not a version 1 log")
    while record := frame(data, at):
        records.append(record)
        at = record["end"]
    later = (m.start() for m in re.finditer(re.escape(data[8:24]), data))
    check(not any(place > at and frame(data, place) for place in later), f"damage from {at}")
    end = max((i for i, r in enumerate(records, 1) if r["opcode"] == COMMIT), default=1)
    tail, records = [r["opcode"] for r in records[end:] if r["opcode"] != PAD], records[:end]
    check(all(r["intact"] for r in records), "a payload is damaged")
    log = {"header": json.loads(records[0]["header"]), "features": {}, "tokens": [], "texts": {}}
    log["layers"] = [json.loads(head.take()) for head, _ in having(records, LAYER)]
    for head, body in having(records, FEATURES):
        width, count = head.fields("I width I count").values()
        log["features"][width] = body.integers(6, count)
    for head, _ in having(records, TEXT):
        log["texts"] |= {int(token): text for token, text in json.loads(head.take()).items()}
    for head, _ in having(records, TOKEN):
        token = head.fields("Q step q token_id q position q pass d time I text")
        log["tokens"].append(token | {"text": head.text(token["text"])})
    for head, body in having(records, PASS):
        p = read_pass(head, body)
        whole = passes.setdefault(p["index"], p) if p["flags"] & 4 else p
        passes[p["index"]] = whole | {k: p[k] for k in ("closed", "aborted")}
    for head, body in having(records, BLOCK):
        for packet in read_block(head, body, log["header"]["codecs"]):
            packets.setdefault(packet["seq"], []).append(packet)
    log |= {"complete": tail == [INDEX, END] and data[at:] == MAGIC, "passes": [*passes.values()]}
    return log | {"packets": [*assemble(packets, {x["id"]: x["name"] for x in log["layers"]})]}
