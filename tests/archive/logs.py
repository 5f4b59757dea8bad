"""Builds small logs from records, without torch: what tests of archives and datasets read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import codecs, dtypes
from actstore.archive import shards
from actstore.packet import Axis, LayerInfo, PassInfo, TokenRecord
from actstore.parallel import Parallel, Shard
from actstore.stream.records import Block, Features, Layer, Opcode, Pass, Record, Run, Text, Token
from actstore.stream.writer import CommitPoint, StreamWriter


@dataclass
class Fired:
    """A packet of a log that is being built: what the oracle of a test looks at."""

    layer: str
    pass_index: int
    call: int
    seq: int
    values: NDArray[Any]


def axis(
    batch: int = 1,
    sequence: int = 1,
    *,
    name: str = "token",
    start: int = 0,
    mask: Sequence[Sequence[bool]] | None = None,
    flat: bool = False,
) -> Axis:
    """Give an axis whose ids are 100, 101, …, and whose positions count from ``start``."""
    shape = (batch, sequence)
    return Axis(
        name,
        batch,
        sequence,
        np.arange(batch * sequence, dtype=np.int64).reshape(shape) + 100,
        np.broadcast_to(np.arange(start, start + sequence, dtype=np.int64), shape).copy(),
        np.ones(shape, np.bool_) if mask is None else np.array(mask, np.bool_).reshape(shape),
        flat,
    )


class LogBuilder:
    """Writes a log record by record; every ``commit`` closes a group.

    Attributes
    ----------
    fired : list of Fired
        What was put, in order, aliases included.
    """

    def __init__(
        self,
        path: Path,
        *,
        compression: str = "zstd",
        capture: Mapping[str, Any] | None = None,
        run: str = "00000000-0000-4000-8000-000000000000",
        parallel: Parallel | None = None,
    ) -> None:
        self.path = path
        self.fired: list[Fired] = []
        self._codec = codecs.NAMES[compression]
        self._layers: dict[str, LayerInfo] = {}
        self._group: list[Record] = []
        self._seq = self._pass = self._step = 0
        self._writer = StreamWriter(path)
        self._writer.__enter__()
        self._writer.start(
            {
                "run_id": run,
                "writer": {"name": "test", "version": "0"},
                "created": "2026-01-01T00:00:00.000+00:00",
                "models": [],
                "capture": {"granularity": "FULL_TENSOR", "compression": compression}
                | dict(capture or {}),
                "rank": 0,
                "world_size": 1,
                "codecs": {str(number): config for number, config in codecs.CODECS.items()},
            }
            | ({"parallel": parallel.header()} if parallel is not None else {})
        )

    def layer(
        self,
        name: str,
        site: str | None = None,
        block: int = -1,
        *,
        shard: Shard | None = None,
        kind: str = "Linear",
    ) -> None:
        """Declare a layer."""
        number, site = len(self._layers), name if site is None else site
        info = LayerInfo(number, name, site, block, kind, shard)
        self._layers[name] = info
        self._group.append(Record(Opcode.LAYER, Layer(info).encode()))

    def features(self, width: int, kept: Sequence[int]) -> None:
        """Say which features of a width are kept."""
        found = Features(width, np.array(kept, np.uint32))
        self._group.append(Record.of(Opcode.FEATURES, *found.encode()))

    def texts(self, texts: Mapping[int, str]) -> None:
        """Say what token ids stand for."""
        self._group.append(Record(Opcode.TEXT, Text(texts).encode()))

    def begin(
        self,
        *axes: Axis,
        annotations: Mapping[str, Any] | None = None,
        keep: int = 0,
        aborted: bool = False,
        index: int | None = None,
    ) -> int:
        """Begin the next pass, and give its index."""
        if index is not None:
            self._pass = index
        info = PassInfo(self._pass, tuple(axes), dict(annotations or {}), aborted, "", keep)
        self._group.append(Record.of(Opcode.PASS, *Pass(info, closed=True).encode()))
        self._pass += 1
        return info.index

    def put(
        self,
        layer: str,
        values: NDArray[Any],
        *,
        call: int = 0,
        alias_of: int | None = None,
        parts: int = 1,
        width: int = 0,
        pass_index: int | None = None,
        apart: bool = False,
    ) -> int:
        """Append a packet, or a part of it in each of several blocks, or groups; give its seq."""
        seq, self._seq = self._seq, self._seq + 1
        index = self._pass - 1 if pass_index is None else pass_index
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if values.size == 0:
            raw = np.zeros(0, np.uint8)
        if alias_of is not None:
            raw = raw[:0]
        for part, piece in enumerate(np.array_split(raw, parts)):
            run = Run(
                seq=seq,
                pass_index=index,
                alias_back=0 if alias_of is None else seq - alias_of,
                count=1,
                seq_step=1,
                pass_step=1,
                call=call,
                call_step=0,
                shape=0,
                part=part,
                parts=parts,
            )
            self._block(layer, values, piece, run, width)
            if apart:
                self.commit()
        self.fired.append(Fired(layer, index, call, seq, values))
        return seq

    def token(self, token_id: int, text: str, *, pass_index: int | None = None) -> None:
        """Record a token that the last pass made."""
        index = self._pass - 1 if pass_index is None else pass_index
        record = TokenRecord(self._step, token_id, text, None, index, 1.5 * self._step)
        self._step += 1
        self._group.append(Record(Opcode.TOKEN, Token(record).encode()))

    def record(self, opcode: int, header: bytes = b"", payload: bytes = b"") -> None:
        """Append any record."""
        self._group.append(Record.of(opcode, header, payload))

    def commit(self) -> None:
        """Close the group."""
        self._writer.append(self._group, CommitPoint(self._seq, self._pass, self._step))
        self._group = []

    def close(self, *, finish: bool = True) -> Path:
        """Commit what is open and close the log, cleanly or as a killed writer leaves it."""
        self.commit()
        if finish:
            self._writer.finish({"duration_seconds": 2.0})
        else:
            self._writer.abandon()
        return self.path

    def _block(
        self, layer: str, values: NDArray[Any], raw: NDArray[np.uint8], run: Run, width: int
    ) -> None:
        kind = dtypes.from_name(values.dtype.name)
        codec, payload = codecs.encode(self._codec, raw, kind.itemsize)
        block = Block(
            self._layers[layer].id, codec, kind.code, width, raw.nbytes, (values.shape,), (run,)
        )
        self._group.append(Record.of(Opcode.BLOCK, block.encode(), payload))


def files_of(folder: Path) -> dict[str, bytes]:
    """Give all files below a folder, by their names within it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def encode_rows(
    rows: NDArray[Any], chunk_rows: int, present: NDArray[np.bool_], fill: Any, profile: str
) -> NDArray[np.uint8]:
    """Encode rows as a shard, of the chunks that are present."""
    chunks = (
        (one, rows[one * chunk_rows : (one + 1) * chunk_rows])
        for one in np.flatnonzero(present).tolist()
    )
    count = present.size
    out = np.empty(shards.room(chunk_rows * rows[:1].nbytes, count, count), np.uint8)
    return shards.encode_shard(chunks, chunk_rows, count, fill, profile, out)


def random_values(shape: Sequence[int], dtype: str = "float32", *, seed: int = 0) -> NDArray[Any]:
    """Give values of a dtype of the formats, from random bits: NaNs and infinities included."""
    kind = dtypes.from_name(dtype)
    generator = np.random.default_rng(seed)
    size = int(np.prod(shape, dtype=np.int64))
    if kind.name == "bool":
        return generator.integers(0, 2, size).astype(np.bool_).reshape(tuple(shape))
    raw = generator.integers(0, 256, size * kind.itemsize).astype(np.uint8)
    return raw.view(kind.numpy).reshape(tuple(shape))


def decoder_log(
    path: Path,
    *,
    prompt: tuple[int, int] = (2, 5),
    steps: int = 4,
    blocks: int = 3,
    width: int = 8,
    vocab: int = 16,
    dtype: str = "bfloat16",
    compression: str = "zstd",
    finish: bool = True,
    run: str = "00000000-0000-4000-8000-000000000000",
) -> LogBuilder:
    """Write the log of a decoder that reads a prompt and generates; ``fired`` is the oracle."""
    log = LogBuilder(path, compression=compression, run=run)
    log.layer("model.embed_tokens", "embed")
    for block in range(blocks):
        log.layer(f"model.layers.{block}.mlp", "mlp", block)
        log.layer(f"model.layers.{block}", "resid", block)
    log.layer("model.norm", "final_norm")
    log.layer("model", "model")
    log.layer("model.rotary", "model.rotary")
    log.layer("lm_head", "logits")
    log.layer("", "output")
    batch, length = prompt
    log.texts({100 + index: f"<{index}>" for index in range(batch * length)})
    for number in range(1 + steps):
        sequence = length if number == 0 else 1
        start = 0 if number == 0 else length + number - 1
        labels = {"topic": [f"item {item}" for item in range(batch)]}
        log.begin(axis(batch, sequence, start=start), annotations=labels)
        seed = 1000 * number
        rows = (batch, sequence, width)
        log.put("model.embed_tokens", random_values(rows, dtype, seed=seed))
        log.put("model.rotary", random_values((sequence, 4), "float32", seed=seed + 1))
        for block in range(blocks):
            for place, site in enumerate((".mlp", "")):
                values = random_values(rows, dtype, seed=seed + 10 * block + place + 2)
                log.put(f"model.layers.{block}{site}", values)
        normed = random_values(rows, dtype, seed=seed + 500)
        log.put("model", normed, alias_of=log.put("model.norm", normed))
        logits = random_values((batch, sequence, vocab), dtype, seed=seed + 501)
        log.put("", logits, alias_of=log.put("lm_head", logits))
        for item in range(batch):
            log.token(7 + item, f"tok{number}.{item}")
        log.commit()
    log.close(finish=finish)
    return log
