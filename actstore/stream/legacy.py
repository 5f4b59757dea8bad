"""Owns reading the logs of PyPI's ``llm-instrumentation`` 1.3.1, as if they were logs of ours.

``legacy_packets.py`` finds and decodes their packets. float32 was rounded to float16; dtypes that
NumPy hasn't were left out, the others kept. Packets may stand in another order than they fired in,
and the values of ``SAMPLED_SLICES`` are in a random one. What a reader needs and such a log
doesn't say is taken as follows; the caller may tell shapes and dtypes.

- A payload that begins as a frame that can hold what it says is one; in a log where at least half
  do, another payload is damaged.
- Values are float16, or uint8 where the bytes are odd in number, flat.
- The n-th packet of a layer is of pass n, where all layers have as many, or those that appear
  last have one less, as in a log that was cut; else no pass is known (-1).
- Where the told shapes ``[batch, sequence, …]`` of a pass agree (or ``[rows, …]``, where there is
  none of three dimensions), its rows are those of an axis ``token``.
- Tokens are those of the files beside the log; the n-th is of pass n where they are as many.
- Bytes at the end that are no whole packet were being written; an error is what can't be framed.
  A run that was killed within a packet and resumed can't be framed behind it.
- The log is complete where nothing of that kind is found, and no checkpoint lies beside it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.dtypes import BY_NAME, DType
from actstore.errors import ActstoreWarning, ConfigError, FormatError
from actstore.packet import Axis, LayerInfo, PassInfo, TokenRecord
from actstore.stream import legacy_packets, sidecars
from actstore.stream.legacy_packets import Codec, Packets
from actstore.stream.reader import StreamReader
from actstore.stream.scan import Damage, LogFile, Scan
from actstore.stream.table import PacketTable

__all__ = ["LegacyReader", "is_legacy"]

Integers = NDArray[np.int64]
#: What a told shape says of the rows of its pass: batch, sequence, and whether these are one.
Rows = tuple[int, int, bool]

_ROW_NDIM, _FLAT_NDIM = 3, 2


def is_legacy(path: str | Path) -> bool:
    """Whether a file begins as such a log does: with a whole packet that has a printable name.

    Logs of ours don't: their first bytes would be a longer packet than any.
    """
    place = Path(path)
    if not os.path.isfile(place):  # noqa: PTH113 - which is False of what may not be looked at
        return False
    with closing(LogFile(place)) as file:
        try:
            first = next(legacy_packets.walk(file), None)
        except FormatError:
            return False
    return first is not None and first.length > 0 and first.name.isprintable()


class LegacyReader(StreamReader):
    """A log of ``llm-instrumentation``, open for reading. Safe to use from several threads.

    It has no checksums, so that many damages leave no trace.

    Parameters
    ----------
    path : str or Path
        The log.
    errors : {"raise", "skip"}
        As for `open_stream`.
    shapes : mapping of str to sequence of int, optional
        Layer -> the shape of its packets, as for `open_stream`. Where the shapes ``[batch,
        sequence, …]`` of a pass agree, its rows are those of an axis ``token``.
    dtypes : mapping of str to str, optional
        Layer -> the dtype of its packets, where it is not float16.

    Raises
    ------
    MissingFileError
        There is no such file.
    ConfigError
        ``errors``, ``shapes`` or ``dtypes`` can't be honoured.
    """

    def __init__(
        self,
        path: str | Path,
        errors: str = "raise",
        *,
        shapes: Mapping[str, Sequence[int]] | None = None,
        dtypes: Mapping[str, str] | None = None,
    ) -> None:
        self._told = _Told.of(shapes, dtypes)
        super().__init__(path, errors)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the log again, in whatever process a copy of this is made."""
        build = partial(type(self), shapes=self._told.shapes, dtypes=self._told.dtypes)
        return build, (self.path.absolute(), "skip" if self._skip else "raise")

    @property
    def knows_steps(self) -> bool:
        """Whether it is known which pass made which token."""
        return any(one.pass_index >= 0 for one in self.tokens)

    def _open(self) -> None:
        self._found = found = legacy_packets.find(self._file)
        self._told.check(found.names, self.local)
        codec, tokens = found.compression(), _tokens(self.local)
        name = None if codec is None else codec.name.lower()
        header = {
            "writer": {"name": "llm-instrumentation", "version": "unknown"},
            "capture": {"compression": name, "track_per_token": tokens is not None},
            "codecs": {},
        }
        intact = (found.codec != Codec.NONE) | (not codec)  # as far as shows without decoding
        damage = self._damage(~intact, f"a payload that is no {name} frame, as the others are")
        whole = found.end == self._file.size
        ended = whole and not sidecars.checkpoint_name(self.local).exists()
        self._load(Scan(header, b"", complete=ended, damage=damage))
        if damage and not self._skip:
            intact &= found.offset < damage[0].offset
        numbered = enumerate(found.names)
        self.layers = MappingProxyType(
            {layer: LayerInfo(number, layer, layer or "output") for number, layer in numbered}
        )
        passes, calls = _passes(found.layer, len(found.names))
        self.table = self._told.table(found, passes, calls, np.flatnonzero(intact))
        self._rows = self._told.rows(found.names, self.table)
        self._passes = {index: [] for index in range(int(passes.max(initial=-1)) + 1)}
        self.tokens = tokens or ()
        if len(self.tokens) == len(self._passes):  # as is advised: a token after each pass
            self.tokens = tuple(replace(one, pass_index=one.step) for one in self.tokens)

    def _damage(self, strays: NDArray[np.bool_], reason: str) -> list[Damage]:
        """Give the damage that shows without decoding, in the order of the file."""
        found = self._found
        lengths = found.start + found.length - found.offset
        damage = [
            Damage(int(found.offset[index]), int(lengths[index]), reason)
            for index in np.flatnonzero(strays).tolist()
        ]
        if found.fault:
            damage.append(Damage(found.end, self._file.size - found.end, found.fault))
        return damage

    # -- packets: each is a block of its own, by its number in the file ---------------------------

    def _block_offset(self, index: int) -> int:
        return int(self._found.offset[index])

    def _decode(self, index: int) -> NDArray[np.uint8]:
        found = self._found
        payload = self._file.read(int(found.start[index]), int(found.length[index]))
        return legacy_packets.decode(int(found.codec[index]), payload, int(found.raw[index]))

    def _bytes(self, row: int) -> NDArray[np.uint8]:
        # what a frame says is no reason to allocate anything before it is decoded
        return self.block(int(self.table.block[row])).copy()

    def _pass_info(self, index: int) -> PassInfo:
        """Give a pass: with an axis where the told shapes agree on its rows."""
        rows = self._rows.get(index, set())
        rows = {one for one in rows if not one[-1]} or rows
        if len(rows) != 1:
            return PassInfo(index)
        ((batch, sequence, flat),) = rows
        unknown = np.broadcast_to(np.int64(-1), (batch, sequence))
        mask = np.broadcast_to(np.True_, (batch, sequence))
        return PassInfo(index, (Axis("token", batch, sequence, unknown, unknown, mask, flat),))


def _passes(layer: Integers, layers: int) -> tuple[Integers, Integers]:
    """Give the pass of each packet, and its call: the n-th packet of a layer is of pass n."""
    order = np.argsort(layer, kind="stable")
    counts = np.bincount(layer, minlength=layers)
    nth = np.empty(layer.size, np.int64)
    nth[order] = np.arange(layer.size) - np.repeat(np.cumsum(counts) - counts, counts)
    if layers and np.all(np.diff(counts) <= 0) and counts[0] - counts[-1] <= 1:
        return nth, np.zeros(layer.size, np.int64)
    return np.full(layer.size, -1, np.int64), nth


# -- what the caller tells ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Told:
    """The shapes and dtypes that a caller gave, by layer."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def of(cls, shapes: object, dtypes: object) -> _Told:
        """Check what was given.

        Raises
        ------
        ConfigError
            It is no mapping of layers to shapes, or to dtypes.
        """
        told: dict[str, tuple[int, ...]] = {}
        for name, shape in _items("shapes", shapes):
            lengths = tuple(shape) if isinstance(shape, Sequence) else (None,)
            if not all(map(_is_length, lengths)) or lengths.count(-1) > 1:
                msg = (
                    f"shapes[{name!r}] must be lengths, of which one may be -1, such as "
                    f"(1, -1, 768); got {shape!r}"
                )
                raise ConfigError(msg)
            told[name] = lengths
        kinds = dict(_items("dtypes", dtypes))
        for name, kind in kinds.items():
            if not isinstance(kind, str) or kind not in BY_NAME:
                msg = f"dtypes[{name!r}] must be one of {', '.join(BY_NAME)}; got {kind!r}"
                raise ConfigError(msg)
        return cls(told, kinds)

    def check(self, names: Sequence[str], path: Path) -> None:
        """Refuse what is told of layers that a log hasn't."""
        for name in (*self.shapes, *self.dtypes):
            if name not in names:
                near = ", ".join(map(repr, names[:8]))
                msg = f"{path} has no layer {name!r} to tell the shape of; it has {near}"
                raise ConfigError(msg)

    def table(
        self, found: Packets, passes: Integers, calls: Integers, kept: Integers
    ) -> PacketTable:
        """Make the packet table of those packets of a log that are kept.

        Raises
        ------
        ConfigError
            A packet doesn't have a size that was told.
        """
        pairs, which = np.unique(
            np.stack([found.layer[kept], found.raw[kept]]), axis=1, return_inverse=True
        )
        forms = [self._form(found.names[layer], raw) for layer, raw in pairs.T.tolist()]
        shapes = {shape: place for place, shape in enumerate(dict.fromkeys(s for _, s in forms))}
        codes = np.array([kind.code for kind, _ in forms], np.int64)
        places = np.array([shapes[shape] for _, shape in forms], np.int64)
        nothing = np.zeros(kept.size, np.int64)
        return PacketTable(
            seq=kept,
            pass_index=passes[kept],
            call=calls[kept],
            layer=found.layer[kept],
            dtype=codes[which.reshape(-1)],
            shape=places[which.reshape(-1)],
            width=nothing,
            alias_of=nothing - 1,
            block=kept,
            offset=nothing,
            nbytes=found.raw[kept],
            part=nothing,
            parts=nothing + 1,
            encoded=found.length[kept],
            shapes=tuple(shapes),
            blocks=(),
        )

    def rows(self, names: Sequence[str], table: PacketTable) -> dict[int, set[Rows]]:
        """Give, by pass, what the told shapes say of its rows."""
        told = np.array([name in self.shapes for name in names], np.bool_)
        mine = told[table.layer] & (table.nbytes > 0) & (table.pass_index >= 0)
        found: dict[int, set[Rows]] = {}
        columns = table.pass_index[mine].tolist(), table.shape[mine].tolist()
        for index, place in zip(*columns, strict=True):
            shape = table.shapes[place]
            if len(shape) >= _ROW_NDIM:
                found.setdefault(index, set()).add((shape[0], shape[1], False))
            elif len(shape) == _FLAT_NDIM:
                found.setdefault(index, set()).add((1, shape[0], True))
        return found

    def _form(self, name: str, nbytes: int) -> tuple[DType, tuple[int, ...]]:
        """Give the dtype and the shape of so many bytes of a layer."""
        kind = BY_NAME[self.dtypes.get(name, "float16")]
        if nbytes % kind.itemsize and name not in self.dtypes and name not in self.shapes:
            kind = BY_NAME["uint8"]
        size, rest = divmod(nbytes, kind.itemsize)
        shape = self.shapes.get(name, (size,))
        known = math.prod(one for one in shape if one >= 0)
        if -1 in shape:
            free = size // known if known else -1
            shape = tuple(free if one < 0 else one for one in shape)
        if rest or math.prod(shape) != size or -1 in shape:
            msg = (
                f"layer {name!r} has a packet of {nbytes} bytes, which is no {kind.name} of the "
                f"shape {self.shapes.get(name, 'of one dimension')}: tell its true shape and dtype"
            )
            raise ConfigError(msg)
        return kind, shape


def _items(argument: str, given: object) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        msg = f"{argument} must be a mapping of the names of layers; got {given!r}"
        raise ConfigError(msg)
    return list(given.items())


def _is_length(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= -1


# -- the files beside a log -----------------------------------------------------------------------


def _tokens(path: Path) -> tuple[TokenRecord, ...] | None:
    """Give the tokens that the files beside a log say; None where there are none.

    Of several the one that says most: the checkpoint of a run that was killed goes on behind the
    table of the one before it.
    """
    names = (
        sidecars.tokens_name(path),
        sidecars.older_tokens_name(path),
        sidecars.checkpoint_name(path),
    )
    found = [tokens for name in names if (tokens := _tokens_of(name)) is not None]
    return max(found, key=len) if found else None


def _tokens_of(name: Path) -> tuple[TokenRecord, ...] | None:
    if not name.is_file():
        return None
    try:
        return sidecars.read_tokens(name)
    except FormatError as error:
        msg = f"the log beside it is read without its tokens: {error}"
        warnings.warn(msg, ActstoreWarning, stacklevel=2)
        return None
