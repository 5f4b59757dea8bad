"""Owns writing passes of named arrays as a ``.stream`` log, by the writer that captures have.

Memory is bounded by a group of `GROUP_BYTES` and one packet. Where the arrays come from is
``foreign``'s and the formats'.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

import actstore
from actstore import codecs, dtypes, files
from actstore.bridges.foreign import Foreign
from actstore.bridges.names import place_of
from actstore.errors import ConfigError, FormatError
from actstore.packet import Axis, LayerInfo, PassInfo
from actstore.stream.records import BLOCK_LIMIT, Block, Layer, Opcode, Pass, Record, Run, Text
from actstore.stream.writer import CommitPoint, StreamWriter

__all__ = ["Content", "LogWriter", "write_log"]

GROUP_BYTES: Final = 64 << 20
_JOINED_BYTES: Final = 1 << 20  # raw bytes of a block of several packets
_JOINED_PACKETS: Final = 4096
_MOST_PARTS: Final = (1 << 16) - 1
_LISTED_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class Content:
    """What was written into a log.

    Attributes
    ----------
    layers : tuple of str
        The layers, in the order in which they came.
    passes, rows, packets : int
        How many.
    raw_bytes : int
        Of all values.
    """

    layers: tuple[str, ...]
    passes: int
    rows: int
    packets: int
    raw_bytes: int


@dataclass(slots=True)
class _Pending:
    """Packets of one layer and dtype that are to be encoded together."""

    runs: list[Run] = field(default_factory=list)
    shapes: dict[tuple[int, ...], int] = field(default_factory=dict)
    raw: list[NDArray[np.uint8]] = field(default_factory=list)
    nbytes: int = 0


class LogWriter:
    """Writes a log pass by pass.

    Parameters
    ----------
    path : Path
        The log, which must not exist.
    attributes : mapping
        Of its HEADER, beyond what every log says.
    compression : str
        ``"zstd"``, ``"lz4"`` or ``"none"``.
    names : mapping, optional
        Layer -> the name that it has in the log.
    tokenizer : object, optional
        With ``decode([id])``: what the ids stand for is kept.
    """

    def __init__(
        self,
        path: Path,
        attributes: Mapping[str, Any],
        *,
        compression: str = "zstd",
        names: Mapping[str, str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._codec = codecs.NAMES[codecs.check_name(compression)]
        self._writer = StreamWriter(path)
        self._attributes = _header(attributes, compression)
        self._names = dict(names or {})
        if not all(isinstance(one, str) for pair in self._names.items() for one in pair):
            msg = f"names must map layers to names, both of them text; got {names!r:.200}"
            raise ConfigError(msg)
        self._tokenizer = tokenizer
        self._layers: dict[str, LayerInfo] = {}
        self._called: dict[str, str] = {}  # a layer's name -> what the source calls it
        self._told: set[int] = set()
        self._group: list[Record] = []
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._group_bytes = self._raw_bytes = self._seq = self._pass = self._rows = 0
        self._aliased: dict[Any, tuple[int, np.dtype, tuple[int, ...]]] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._writer.__enter__()
        self._writer.start(self._attributes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, traceback)

    def begin(self, axis: Axis | None, annotations: Mapping[str, Sequence[Any]]) -> None:
        """Begin the next pass."""
        axes = () if axis is None else (axis,)
        if axis is not None:
            self._rows += axis.rows
            self._tell(axis.token_ids)
        info = PassInfo(self._pass, axes, {name: list(one) for name, one in annotations.items()})
        self._add(Record.of(Opcode.PASS, *Pass(info, closed=True).encode()))
        self._pass += 1
        self._aliased = {}

    def put(self, layer: str, values: NDArray[Any], *, call: int = 0, same_as: Any = None) -> None:
        """Append a packet of the pass.

        Parameters
        ----------
        layer : str
            Its layer.
        values : numpy.ndarray
            Its values, of a dtype that logs hold.
        call : int
            The how-manieth of the layer in the pass.
        same_as : hashable, optional
            Equal for arrays of the pass that have the same memory.

        Raises
        ------
        FormatError
            Logs can't hold such values.
        """
        try:
            kind = dtypes.from_name(values.dtype.name)
        except FormatError as error:
            msg = f"layer {layer!r}: {error}"
            raise FormatError(msg) from None
        number = self._layer(layer).id
        seq, self._seq = self._seq, self._seq + 1
        first, dtype, shape = self._aliased.setdefault(same_as, (seq, values.dtype, values.shape))
        back = seq - first if same_as is not None and values.size else 0
        if (dtype, shape) != (values.dtype, values.shape):
            back = 0
        raw = _raw(values, kind) if not back else np.zeros(0, np.uint8)
        self._raw_bytes += raw.nbytes
        run = Run(seq, self._pass - 1, back, 1, 0, 0, call, 0, 0)
        pending = self._pending.setdefault((number, kind.code), _Pending())
        if raw.nbytes > BLOCK_LIMIT:
            self._put_parts((number, kind.code), values.shape, run, raw)
        else:
            full = pending.nbytes + raw.nbytes > _JOINED_BYTES
            if pending.runs and (full or len(pending.runs) >= _JOINED_PACKETS):
                self._encode(number, kind.code)
                pending = self._pending.setdefault((number, kind.code), _Pending())
            place = pending.shapes.setdefault(values.shape, len(pending.shapes))
            pending.runs.append(_placed(run, place))
            pending.raw.append(raw)
            pending.nbytes += raw.nbytes
            self._group_bytes += raw.nbytes
        if self._group_bytes >= GROUP_BYTES:
            self._commit()

    def finish(self) -> Content:
        """Close the log, durably, and say what is in it."""
        self._commit()
        content = Content(tuple(self._layers), self._pass, self._rows, self._seq, self._raw_bytes)
        seconds = time.monotonic() - self._began
        self._writer.finish(
            {
                "duration_seconds": seconds,
                "packets_captured": content.packets,
                "raw_bytes": content.raw_bytes,
            }
        )
        return content

    def _layer(self, given: str) -> LayerInfo:
        name = self._names.get(given, given)
        if name not in self._layers:
            site, block = place_of(name)
            info = LayerInfo(len(self._layers), name, site, block)
            self._layers[name] = info
            self._called[name] = given
            self._add(Record(Opcode.LAYER, Layer(info).encode()))
        elif self._called[name] != given:
            msg = f"{given!r} and {self._called[name]!r} would both be {name!r}; see names="
            raise ConfigError(msg)
        return self._layers[name]

    def _tell(self, ids: NDArray[np.int64]) -> None:
        """Say what ids stand for that come for the first time."""
        if self._tokenizer is None:
            return
        new = {one for one in np.unique(ids).tolist() if one >= 0} - self._told
        self._told |= new
        texts = {one: str(self._tokenizer.decode([one])) for one in sorted(new)}
        for record in Text.split(texts):
            self._add(Record(Opcode.TEXT, record.encode()))

    def _put_parts(
        self, key: tuple[int, int], shape: tuple[int, ...], run: Run, raw: NDArray[np.uint8]
    ) -> None:
        count = -(-raw.nbytes // BLOCK_LIMIT)
        if count > _MOST_PARTS:
            msg = f"a tensor of {raw.nbytes} bytes is too large for a log; cut it"
            raise FormatError(msg)
        for part in range(count):
            piece = raw[part * BLOCK_LIMIT : (part + 1) * BLOCK_LIMIT]
            one = Run(run.seq, run.pass_index, 0, 1, 0, 0, run.call, 0, 0, part, count)
            self._block(key, [one], [shape], piece)
            self._group_bytes += piece.nbytes

    def _encode(self, layer: int, dtype: int) -> None:
        pending = self._pending.pop((layer, dtype))
        if pending.runs:
            raw = np.concatenate(pending.raw) if len(pending.raw) > 1 else pending.raw[0]
            self._block((layer, dtype), pending.runs, list(pending.shapes), raw)

    def _block(
        self,
        key: tuple[int, int],
        runs: Sequence[Run],
        shapes: Sequence[tuple[int, ...]],
        raw: NDArray[np.uint8],
    ) -> None:
        layer, dtype = key
        used, encoded = codecs.encode(self._codec, raw, dtypes.from_code(dtype).itemsize)
        block = Block(layer, used, dtype, 0, raw.nbytes, tuple(shapes), tuple(runs))
        self._group.append(Record.of(Opcode.BLOCK, block.encode(), encoded))

    def _add(self, record: Record) -> None:
        self._group.append(record)
        self._group_bytes += record.head_length + record.payload_length

    def _commit(self) -> None:
        for layer, dtype in list(self._pending):
            self._encode(layer, dtype)
        self._writer.append(self._group, CommitPoint(self._seq, self._pass, 0, False))
        self._group, self._group_bytes = [], 0


def write_log(
    foreign: Foreign,
    kind: str,
    path: Path,
    *,
    compression: str = "zstd",
    names: Mapping[str, str] | None = None,
    tokenizer: Any = None,
) -> Content:
    """Write a foreign source as a log.

    Parameters
    ----------
    foreign : Foreign
        The source.
    kind : str
        Its kind.
    path : Path
        The log, which must not exist.
    compression, names, tokenizer
        As for `LogWriter`.

    Raises
    ------
    FormatError
        The source is not what it says, or holds nothing.
    ConfigError
        A name that ``names`` has is no layer's.
    """
    about = {
        "imported": {
            "kind": kind,
            "layout": foreign.layout,
            "about": dict(foreign.about),
            **_files(foreign.files),
        }
    }
    with ExitStack() as stack:
        log = stack.enter_context(
            LogWriter(path, about, compression=compression, names=names, tokenizer=tokenizer)
        )
        seen = set()
        for one in foreign.passes:
            log.begin(one.axis, one.annotations)
            for firing in one.firings:
                seen.add(firing.layer)
                log.put(firing.layer, firing.values, call=firing.call, same_as=firing.same_as)
        unknown = sorted(set(names or {}) - seen)
        if unknown:
            known = ", ".join(map(repr, sorted(seen)[:8]))
            msg = f"names has {unknown[0]!r}, which no layer is called; there are {known}"
            raise ConfigError(msg)
        if not seen:
            msg = "the source holds no activations; nothing was written"
            raise FormatError(msg)
        return log.finish()


def _placed(run: Run, shape: int) -> Run:
    return Run(
        *(run.seq, run.pass_index, run.alias_back, 1, 0, 0, run.call, 0, shape)  # of one packet
    )


def _raw(values: NDArray[Any], kind: dtypes.DType) -> NDArray[np.uint8]:
    """Give the bytes of values, little-endian, in C order; a copy where they are not that."""
    if not values.size:
        return np.zeros(0, np.uint8)
    foreign = values.dtype.byteorder == ">"
    plain = values.astype(kind.numpy) if foreign else np.ascontiguousarray(values)
    raw = plain.reshape(-1).view(np.uint8)
    return (raw != 0).view(np.uint8) if kind.name == "bool" else raw


def _header(attributes: Mapping[str, Any], compression: str) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {
        "run_id": str(uuid.uuid4()),
        "writer": {"name": "actstore", "version": actstore.__version__},
        "created": now,
        "models": [],
        "capture": {"granularity": None, "compression": compression},
        "rank": 0,
        "world_size": 1,
        "codecs": {str(one): config for one, config in codecs.CODECS.items()},
        **attributes,
    }


def _files(paths: Sequence[Path]) -> dict[str, Any]:
    """Say what files a source is: names, bytes and SHA-256; of very many, of their list."""
    if not paths:
        return {"files": []}
    root = paths[0].parent
    while not all(path.is_relative_to(root) for path in paths):
        root = root.parent
    listed: list[dict[str, Any]] = []
    whole = hashlib.sha256()
    for path in paths:
        name, digest = path.relative_to(root).as_posix(), files.sha256(path)
        nbytes = path.stat().st_size
        whole.update(f"{digest}  {nbytes}  {name}\n".encode("utf-8", "surrogateescape"))
        if len(listed) < _LISTED_FILES:
            listed.append({"name": name, "bytes": nbytes, "sha256": digest})
    return {"files": listed, "file_count": len(paths), "files_sha256": whole.hexdigest()}
