"""Owns ``export_rows``: rows of a dataset as Parquet, safetensors, or what SAELens caches.

Values are read a piece of the rows at a time. How the files look is ``arrow``'s and
``safe_tensors``'s.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

import actstore
from actstore import dtypes, files, hook_names
from actstore.accessor import beneath_dask
from actstore.archive.coordinates import SOURCE_ROW
from actstore.arguments import check_memory
from actstore.bridges import arrow, safe_tensors
from actstore.bridges.folders import LABELS
from actstore.buckets import local_target, place_of
from actstore.dataset import open_lazily
from actstore.errors import ConfigError

__all__ = ["ExportReport", "export_rows"]

_FORMATS: Final = {".parquet": "parquet", ".safetensors": "safetensors", "": "saelens"}
#: Of the memory, what the rows of a piece may take: they are read, converted and encoded.
_SHARE: Final = 4
_MOST_ROWS: Final = 1 << 20
_TEXT: Final = ("T", "U", "O")


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export made.

    Attributes
    ----------
    path : Path
        The file or folder.
    format : str
        ``"parquet"``, ``"safetensors"`` or ``"saelens"``.
    layers : mapping of str to str
        Layer -> the name that it has there.
    rows : int
        Of each layer; of SAELens' format, where they differ, of the one with fewest.
    left_out : int
        Rows that are not there: of SAELens' format, padding, missing ones, and those at the end of
        a sequence that fill no context.
    nbytes : int
        Of all files.
    seconds : float
        What it took.
    """

    path: Path
    format: str
    layers: Mapping[str, str]
    rows: int
    left_out: int
    nbytes: int
    seconds: float


def export_rows(
    source: str | os.PathLike[str] | xr.Dataset,
    target: str | os.PathLike[str],
    *,
    layers: str | Sequence[str] | None = None,
    format: str | None = None,
    names: Mapping[str, str] | None = None,
    context_size: int | None = None,
    dim: str | None = None,
    max_memory_gb: float = 0.25,
) -> ExportReport:
    """Write rows and their labels in a format of other tools.

    The target appears when it is whole. bfloat16 and float8 stay what they were in safetensors,
    exactly, unless the archive was made with a ``precision``; elsewhere they are float32 of the
    same values.

    ``"parquet"``
        A column for each label of the rows, and for each layer lists of fixed length; rows that a
        layer doesn't have are null there.
    ``"safetensors"``
        A tensor for each layer and each label; text as UTF-8 bytes and offsets. Missing rows are
        NaN, or 0; ``<layer>.present`` tells them.
    ``"saelens"``
        A folder that ``ActivationsStore`` reads as ``cached_activations_path``: sequences of
        ``context_size`` rows with their ``token_ids``. Sequences are the rows of a batch item of a
        pass, without padding, cut into whole contexts. Of several layers, a folder for each.

    Parameters
    ----------
    source : path or xarray.Dataset
        A log or an archive, also by a URL for which the environment says what is needed; or a
        dataset, or rows of it as ``dataset.actstore`` chooses them.
    target : path
        ``.parquet``, ``.safetensors``, or without an ending, a folder for SAELens; must not exist.
    layers : str or sequence of str, optional
        As `dataset.actstore.layer` takes them; all if it isn't given.
    format : {"parquet", "safetensors", "saelens"}, optional
        Where the target's name doesn't say it.
    names : mapping, optional
        Layer, as ``layers`` or `dataset.actstore.layers` names it -> the name that it gets. In
        SAELens' format it is TransformerLens' name, where there is one, else always the layer's
        own.
    context_size : int, optional
        Of SAELens' format; the length of the sequences, if they all have one.
    dim : str, optional
        The token axis, where there are several.
    max_memory_gb : float
        GB that the values of a piece take, with what is made of them; labels take some 40 bytes a
        row besides.

    Returns
    -------
    ExportReport
        What was made.

    Raises
    ------
    ConfigError
        An argument can't be honoured, a layer isn't there, or a package isn't.
    ArchiveError
        The target can't be written.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_dataset`.
    """
    began = time.monotonic()
    check_memory(max_memory_gb)
    path = local_target(target, "export_rows")
    kind = _FORMATS.get(path.suffix, "") if format is None else format
    if kind not in _FORMATS.values():
        msg = (
            "the target must end with .parquet or .safetensors, or without an ending for SAELens, "
            f"or format= say one of {', '.join(_FORMATS.values())}; got {path.name!r}, {format!r}"
        )
        raise ConfigError(msg)
    if kind != "saelens" and context_size is not None:
        msg = f"context_size is of SAELens' format; the target is {kind}"
        raise ConfigError(msg)
    with ExitStack() as stack:
        if isinstance(source, xr.Dataset):
            dataset = source
        else:
            place = place_of(source, "export_rows")
            dataset = stack.enter_context(open_lazily(place))
        rows = _Rows.of(beneath_dask(dataset), layers, names or {}, dim, max_memory_gb, kind)
        made = stack.enter_context(files.appearing(path, folder=kind == "saelens"))
        if kind == "parquet":
            count = _write_parquet(rows, made)
        elif kind == "safetensors":
            count = _write_safetensors(rows, made)
        else:
            count = _write_saelens(rows, made, context_size)
        nbytes = sum(one.stat().st_size for one in [made, *made.rglob("*")] if one.is_file())
    return ExportReport(
        path,
        kind,
        {layer.name: layer.out for layer in rows.layers},
        count,
        rows.count - count,
        nbytes,
        time.monotonic() - began,
    )


# -- what is read -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A layer of a dataset: its name there and in the files, its values, and which are present."""

    name: str
    out: str
    values: xr.Variable
    present: xr.Variable | None
    source: str

    @property
    def width(self) -> int:
        return int(np.prod(self.values.shape[1:], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        return max(self.width * int(self.values.dtype.itemsize), 1)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Read rows: [n, width]."""
        found = self.values[rows].values
        return found.reshape(len(found), self.width)

    def read_present(self, rows: slice) -> NDArray[np.bool_] | None:
        """Read which rows are present; None where all are."""
        return None if self.present is None else np.asarray(self.present[rows].values, np.bool_)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of a token axis: labels, layers, and how many are read at a time."""

    dataset: xr.Dataset
    dim: str
    labels: tuple[str, ...]
    layers: tuple[_Layer, ...]
    memory: int

    @classmethod
    def of(
        cls,
        dataset: xr.Dataset,
        wanted: str | Sequence[str] | None,
        names: Mapping[str, str],
        dim: str | None,
        gigabytes: float,
        kind: str,
    ) -> _Rows:
        table = dataset.isel(dict.fromkeys(map(str, dataset.sizes), slice(0, 0)))
        labels = table.actstore.table(dim=dim)
        axis = str(labels.index.name)
        known = dataset.actstore.layers
        if wanted is None:
            mine = [name for name in known if _is_on(dataset, name, axis)]
        else:
            mine = [wanted] if isinstance(wanted, str) else list(wanted)
        unknown = sorted(set(names) - set(mine))
        if unknown or not mine:
            what = f"names has {unknown[0]!r}" if unknown else "no layer is chosen"
            said = ", ".join(map(repr, mine or list(known)[:8])) or "none"
            msg = f"{what}; the layers are {said}"
            raise ConfigError(msg)
        layers = tuple(_layer(dataset, name, axis, names.get(name), kind) for name in mine)
        taken = [one.out for one in layers] + ([] if kind == "saelens" else list(labels.columns))
        twice = next((name for name in taken if taken.count(name) > 1), None)
        if twice is not None:
            msg = f"two columns would be called {twice!r}; rename one with names="
            raise ConfigError(msg)
        return cls(dataset, axis, tuple(map(str, labels.columns)), layers, int(gigabytes * 1e9))

    @property
    def count(self) -> int:
        """How many rows there are."""
        return int(self.dataset.sizes[self.dim])

    def column(self, label: str, rows: slice = slice(None)) -> NDArray[Any]:
        """Read a label; text as objects."""
        values: NDArray[Any] = self.dataset.variables[label][rows].values
        return values.astype(object) if values.dtype.kind in _TEXT else values

    def columns(self, label: str) -> Iterator[NDArray[Any]]:
        """Read a label, some rows at a time."""
        for first in range(0, self.count, _MOST_ROWS):
            yield self.column(label, slice(first, min(first + _MOST_ROWS, self.count)))

    def pieces(self, layers: Sequence[_Layer]) -> Iterator[slice]:
        """Yield rows that can be in memory together, of some layers."""
        step = self.memory // _SHARE // sum(layer.row_bytes for layer in layers)
        chunks = [layer.values.encoding.get("chunks") for layer in layers]
        chunk = max(
            (
                one[-len(layer.values.shape)]
                for one, layer in zip(chunks, layers, strict=True)
                if one
            ),
            default=1,
        )
        step = min(max(step - step % chunk, min(step, chunk), 1), _MOST_ROWS)
        for first in range(0, self.count, step):
            yield slice(first, min(first + step, self.count))


def _is_on(dataset: xr.Dataset, name: str, dim: str) -> bool:
    """Whether a layer has rows on a token axis."""
    try:
        dataset.actstore.layer(name, dim=dim)
    except ConfigError:
        return False
    return True


def _layer(dataset: xr.Dataset, name: str, dim: str, given: str | None, kind: str) -> _Layer:
    array = dataset.actstore.layer(name, dim=dim)
    own = str(array.attrs["modules"][0])
    present = dataset.get(f"{array.name}_present")
    if present is not None and "layer" in present.dims:
        place = int(np.flatnonzero(dataset["layer"].values == int(array["layer"]))[0])
        present = present.isel(layer=place)
    if present is not None and bool(present.values.all()):
        present = None
    kept = array.attrs.get("source_dtype", array.dtype.name)
    block = int(array["layer"]) if "layer" in array.coords else -1
    out = given or own or str(array.attrs.get("site"))
    if kind == "saelens" and given is None:
        out = hook_names.name_of(str(array.attrs.get("site")), block) or out
    return _Layer(
        own,
        out,
        array.variable.transpose(dim, ...),
        None if present is None else present.variable,
        array.dtype.name if "precision" in array.attrs else str(kept),
    )


# -- what is written ----------------------------------------------------------------------------


def _about(rows: _Rows) -> dict[str, str]:
    """Give what every file says of itself."""
    runs = [one.get("run_id") for one in rows.dataset.attrs.get("runs", ()) if one]
    layers = {
        layer.out: {
            "layer": layer.name,
            "shape": list(layer.values.shape[1:]),
            "source_dtype": layer.source,
        }
        for layer in rows.layers
    }
    return {
        "actstore.version": actstore.__version__,
        "actstore.runs": json.dumps(runs),
        "actstore.layers": json.dumps(layers),
    }


def _write_parquet(rows: _Rows, path: Path) -> int:
    kinds = {}
    for label in rows.labels:
        dtype = rows.dataset.variables[label].dtype
        kinds[label] = "string" if dtype.kind in _TEXT else dtype.name
    features = {layer.out: (layer.values.dtype, layer.width) for layer in rows.layers}
    for name, (dtype, _) in features.items():
        if dtype.kind == "c":
            msg = (
                f"{name!r} is complex, which Parquet can't hold; leave it out, or take safetensors"
            )
            raise ConfigError(msg)
    writer = arrow.TableWriter(path, kinds, features, _about(rows))
    for piece in rows.pieces(rows.layers):
        writer.write(
            {label: rows.column(label, piece) for label in rows.labels},
            {layer.out: (layer.read(piece), layer.read_present(piece)) for layer in rows.layers},
        )
    writer.finish()
    return rows.count


Tensor = tuple[str, tuple[int, ...], Callable[[], Iterator[NDArray[Any]]]]


def _write_safetensors(rows: _Rows, path: Path) -> int:
    tensors: dict[str, Tensor] = {}
    labels: list[str] = []
    for label in rows.labels:
        mine = _label_tensors(rows, label)
        labels += mine
        tensors |= mine
    for layer in rows.layers:
        kind = layer.source if layer.source in safe_tensors.NAMES else layer.values.dtype.name
        tensors[layer.out] = kind, layer.values.shape, _read(rows, layer, kind)
        if layer.present is not None:
            present = layer.read_present(slice(None))
            name = f"{layer.out}.present"
            labels.append(name)
            tensors[name] = "bool", (rows.count,), _once(present)
    about = _about(rows) | {LABELS: json.dumps(labels)}
    with path.open("xb") as file:
        safe_tensors.write(file, tensors, about)
    with safe_tensors.opened(path):  # the library has the last word on whether it is one
        return rows.count


def _label_tensors(rows: _Rows, label: str) -> dict[str, Tensor]:
    """Give a label as tensors that are read when they are written: text as bytes and offsets."""
    kind, pieces = rows.dataset.variables[label].dtype, partial(rows.columns, label)
    if kind.kind not in _TEXT:
        return {label: (kind.name, (rows.count,), pieces)}
    offsets = np.zeros(rows.count + 1, np.int64)
    done = 0
    for texts in pieces():
        lengths = [len(one) for one in _encoded(texts)]
        offsets[done + 1 : done + 1 + len(lengths)] = lengths
        done += len(lengths)
    np.cumsum(offsets, out=offsets)

    def read() -> Iterator[NDArray[np.uint8]]:
        for texts in pieces():
            yield np.frombuffer(b"".join(_encoded(texts)), np.uint8)

    return {
        f"{label}_bytes": ("uint8", (int(offsets[-1]),), read),
        f"{label}_offsets": ("int64", offsets.shape, _once(offsets)),
    }


def _encoded(texts: NDArray[Any]) -> list[bytes]:
    return [str(one).encode("utf-8", "replace") for one in texts.tolist()]


def _once(values: Any) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: iter([values])


def _read(rows: _Rows, layer: _Layer, kind: str) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: (_narrow(layer.read(one), kind, layer) for one in rows.pieces([layer]))


def _narrow(values: NDArray[Any], kind: str, layer: _Layer) -> NDArray[Any]:
    """Give values in the dtype that they had in the log, of which float32 holds each.

    Raises
    ------
    ConfigError
        They are others: someone computed with them.
    """
    target = dtypes.from_name(kind).numpy
    if values.dtype == target:
        return values
    if kind == "bfloat16" and values.dtype == np.float32:
        bits = np.ascontiguousarray(values).view(np.uint32)
        lost = bool((bits & 0xFFFF).any())
        found: NDArray[Any] = (bits >> 16).astype(np.uint16).view(target)
    else:
        found = values.astype(target)
        lost = not np.array_equal(found.astype(values.dtype), values, equal_nan=True)
    if lost:
        msg = (
            f"{layer.name!r} says that it was {kind}, and holds other values; drop its attribute "
            "source_dtype"
        )
        raise ConfigError(msg)
    return found


def _write_saelens(rows: _Rows, folder: Path, context: int | None) -> int:
    counts = []
    for layer in rows.layers:
        if layer.values.dtype.kind != "f":
            msg = f"{layer.name!r} is of {layer.values.dtype}; SAELens caches floats"
            raise ConfigError(msg)
        place = folder
        if len(rows.layers) > 1:
            place = folder / layer.out
            if place.parent != folder:
                msg = f"{layer.out!r} can't name a folder; give another with names="
                raise ConfigError(msg)
            place.mkdir()
        counts.append(_write_sequences(rows, layer, place, context))
    return min(counts)


def _write_sequences(rows: _Rows, layer: _Layer, folder: Path, context: int | None) -> int:
    starts, length = _sequences(rows, layer, context)
    ids = rows.column(_label(rows, "token_id"))
    told = bool((ids[starts] >= 0).all())
    low = np.iinfo(np.int32).max
    if told and ids.max(initial=0) > low:
        msg = f"a token id is {ids.max()}; SAELens' are int32"
        raise ConfigError(msg)
    writer = arrow.SequenceWriter(
        folder, layer.out, (length, layer.width), layer.values.dtype, ids=told
    )
    step = max(rows.memory // _SHARE // (layer.row_bytes * length), 1)
    for first in range(0, len(starts), step):
        some = starts[first : first + step]
        places = (some[:, np.newaxis] + np.arange(length)).reshape(-1)
        values = layer.read(_whole(places)).reshape(len(some), length, layer.width)
        here = ids[places].reshape(len(some), length).astype(np.int32) if told else None
        writer.write(values, here)
    writer.finish()
    return len(starts) * length


def _sequences(rows: _Rows, layer: _Layer, context: int | None) -> tuple[NDArray[np.int64], int]:
    """Give the rows at which whole contexts begin, each of consecutive rows, and their length."""
    keys = [_label(rows, one) for one in ("pass_index", "batch_item")]
    keys += ["run"] if "run" in rows.labels else []
    kept = ~rows.column(_label(rows, "is_padding")).astype(np.bool_)
    present = layer.read_present(slice(None))
    if present is not None:
        kept &= present
    source = _label(rows, SOURCE_ROW)
    if source in rows.labels and context != 1 and (np.diff(rows.column(source)) < 0).any():
        msg = (
            f"the rows of {layer.name!r} are shuffled, and no sequences; export "
            f"dataset.sortby({source!r}), or sequences of context_size=1"
        )
        raise ConfigError(msg)
    begins = np.ones(rows.count, np.bool_)
    if rows.count:
        same = np.ones(rows.count - 1, np.bool_)
        if source in rows.labels:
            same &= np.diff(rows.column(source)) == 1
        for one in keys:
            column = rows.column(one)
            same &= column[1:] == column[:-1]
        begins[1:] = ~same | (kept[1:] != kept[:-1])
    heads = np.flatnonzero(begins & kept)
    every = np.append(np.flatnonzero(begins), rows.count)
    lengths = every[np.searchsorted(every, heads, side="right")] - heads
    found = np.unique(lengths).tolist()
    if context is None and len(found) != 1:
        said = ", ".join(map(str, found[:8])) or "no"
        msg = (
            f"the sequences of {layer.name!r} have {said} rows; say with context_size= how many "
            "a context has, or choose rows"
        )
        raise ConfigError(msg)
    length = found[0] if context is None else context
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        msg = f"context_size must be a positive int; got {context!r}"
        raise ConfigError(msg)
    starts = [
        head + np.arange(count // length) * length
        for head, count in zip(heads.tolist(), lengths.tolist(), strict=True)
    ]
    whole = np.concatenate(starts) if starts else np.zeros(0, np.int64)
    if not whole.size:
        msg = f"no sequence has {length} rows; the longest has {max(found, default=0)}"
        raise ConfigError(msg)
    return whole.astype(np.int64), length


def _label(rows: _Rows, label: str) -> str:
    """Give the name of a label on the axis: with the prefix that an encoder's labels have."""
    full = rows.dim.removesuffix("token") + label
    return full if full in rows.labels else label


def _whole(places: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Give rows that follow each other as a slice."""
    if places.size and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places
