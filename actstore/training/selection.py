"""Owns which rows of which layers are trained on, and reading them; without torch.

What a log or an archive holds, and how it is read, ``dataset`` knows; in which order, ``order``.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore import files
from actstore.accessor import TokenAxis, token_axes
from actstore.buckets import RemotePath, remote
from actstore.dataset import chunk_reader, layer_reader, open_lazily
from actstore.errors import ConfigError
from actstore.stream.legacy import is_legacy
from actstore.stream.resume import is_log
from actstore.stream.segments import is_segmented

__all__ = ["Choice", "Selection"]

Integers = NDArray[np.int64]
#: Bytes of the rows of a log that are read together: a block is decoded for all of them.
_OF_A_LOG: Final = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What is chosen: all that a process needs to open it.

    Attributes
    ----------
    path : Path or RemotePath
        A log or an archive.
    layers : str or tuple of str
        A layer, or a site for all of its layers; or several layers.
    labels : tuple of str
        What rows come with.
    rows : numpy.ndarray or None
        Which rows: bool, or integers.
    padding : bool
        Whether padding is kept.
    dim : str or None
        The token axis.
    """

    path: Path | RemotePath
    layers: str | tuple[str, ...]
    labels: tuple[str, ...] = ()
    rows: NDArray[Any] | None = None
    padding: bool = False
    dim: str | None = None

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        layers: str | Sequence[str],
        labels: Sequence[str],
        rows: Any,
        *,
        padding: bool,
        dim: str | None,
        storage_options: Mapping[str, Any] | None,
    ) -> Choice:
        """Check what a user chose, as far as that goes without opening it."""
        named = layers if isinstance(layers, str) else tuple(layers)
        if not named or not all(isinstance(one, str) for one in named):
            msg = f"layers must name a layer, a site, or several layers; got {layers!r}"
            raise ConfigError(msg)
        if isinstance(labels, str):
            labels = (labels,)
        chosen = None if rows is None else np.asarray(rows)
        if chosen is not None and (chosen.ndim != 1 or chosen.dtype.kind not in "biu"):
            said = f"{chosen.dtype} {chosen.shape}"
            msg = f"rows must be one-dimensional, bools or integers; got {said}"
            raise ConfigError(msg)
        far = remote(path, storage_options)
        place = far or files.existing(path, "actstore.training").absolute()
        return cls(place, named, tuple(labels), chosen, padding, dim)


class Selection:
    """Rows of one layer or several, opened. Safe to use from several threads, and after a fork.

    Parameters
    ----------
    choice : Choice
        Which.

    Attributes
    ----------
    names : tuple of str
        The layers.
    shape : tuple of int
        Of a row: of several layers, they come first.
    dtype : numpy.dtype
        Of the values, as datasets have them.
    kept : numpy.ndarray or None
        int64: the rows that are chosen, ascending; None where all are.
    labels : mapping of str to numpy.ndarray
        Of all rows of the axis.
    unit : int
        Rows of the axis that are read together.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self._lock = threading.Lock()
        self._process = os.getpid()
        dataset = self._open()
        variable, self.names, self.places = _resolve(dataset, choice)
        self.variables = variable
        first = dataset.variables[variable[0]]
        axes = token_axes(dataset)
        dim = next((str(one) for one in first.dims if one in axes), "")
        if not dim:
            msg = f"{variable[0]!r} has no rows; its dimensions are {first.dims!r}"
            raise ConfigError(msg)
        axis, at = axes[dim], first.dims.index(dim)
        self.rows, self.dtype = first.shape[at], first.dtype
        self.row_shape = first.shape[at + 1 :]
        several = not isinstance(choice.layers, str) or len(self.places) > 1
        self.shape = (len(self.places), *self.row_shape) if several else self.row_shape
        _check_alike(dataset, variable, dim)
        self.kept = self._kept(dataset, axis)
        self.labels = {one: _label(axis, one) for one in choice.labels}
        self.unit = self._unit(first, at)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.choice,)

    @property
    def count(self) -> int:
        """How many rows are chosen."""
        return self.rows if self.kept is None else self.kept.size

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Which rows of which runs these are, in which order, in values that JSON has."""
        return {
            "runs": [one.get("run_id") for one in self._dataset.attrs.get("runs", ())],
            "layout": self._dataset.attrs.get("layout"),
            "shuffle_seed": self._dataset.attrs.get("shuffle_seed"),
            "layers": list(self.names),
            "labels": list(self.labels),
            "crc32_of_counts": zlib.crc32(self.counts()),
            "crc32_of_rows": None if self.kept is None else zlib.crc32(self.kept),
        }

    def counts(self) -> Integers:
        """Give the chosen rows of each unit."""
        bounds = np.append(np.arange(0, self.rows, self.unit), self.rows)
        if self.kept is None:
            return np.diff(bounds)
        return np.diff(np.searchsorted(self.kept, bounds))

    def of_unit(self, unit: int, first: int, last: int) -> Integers:
        """Give the rows of the axis that are the chosen ones of a unit, from first to last."""
        begin = unit * self.unit
        if self.kept is None:
            return np.arange(begin + first, begin + last)
        start = int(np.searchsorted(self.kept, begin))
        return self.kept[start + first : start + last]

    def read(self, place: int, rows: Integers) -> NDArray[Any]:
        """Read rows of the axis of one of the layers: [n, *row_shape]."""
        if self._process != os.getpid():
            if isinstance(self.choice.path, RemotePath):  # connections don't outlive a fork
                msg = (
                    f"{self.choice.path} can't be read by a process that was forked: give the "
                    'DataLoader multiprocessing_context="spawn", or no workers'
                )
                raise ConfigError(msg)
            with self._lock:
                if self._process != os.getpid():  # files are not shared with another process
                    self._open()
                    self._process = os.getpid()
        return self._readers[self.variables[place]](self.places[place], rows)

    def read_unit(self, place: int, unit: int, first: int, last: int) -> NDArray[Any]:
        """Read the chosen rows of a unit of one of the layers, from first to last."""
        rows = self.of_unit(unit, first, last)
        chunks = self._chunks.get(self.variables[place])
        if chunks is None or self._process != os.getpid():
            return self.read(place, rows)
        found = chunks(self.places[place], unit)
        if found is None or len(found) != self.unit:
            return self.read(place, rows)
        begin = unit * self.unit
        return found[first:last] if self.kept is None else found[rows - begin]

    def close(self) -> None:
        """Close what is open."""
        self._dataset.close()

    def _open(self) -> xr.Dataset:
        self._dataset = dataset = open_lazily(self.choice.path)
        self._readers = {
            str(name): layer_reader(one) for name, one in dataset.variables.items()
            if name in dataset.data_vars
        }  # fmt: skip
        self._chunks = {
            name: reader
            for name in self._readers
            if (reader := chunk_reader(dataset.variables[name])) is not None
        }
        return dataset

    def _kept(self, dataset: xr.Dataset, axis: TokenAxis) -> Integers | None:
        """Give the rows that are chosen, are there in all layers, and are no padding."""
        kept = np.ones(self.rows, np.bool_)
        chosen = self.choice.rows
        if chosen is not None:
            if chosen.dtype.kind == "b" and chosen.size != self.rows:
                msg = f"rows has {chosen.size} bools; {axis.dim!r} has {self.rows} rows"
                raise ConfigError(msg)
            if chosen.dtype.kind != "b" and chosen.size:
                if chosen.min() < 0 or chosen.max() >= self.rows:
                    said = f"{chosen.min()} to {chosen.max()}"
                    msg = f"rows must be from 0 to {self.rows - 1}; got {said}"
                    raise ConfigError(msg)
                if np.unique(chosen).size < chosen.size:
                    msg = "rows has a row twice; each is trained on once in an epoch"
                    raise ConfigError(msg)
            kept[:] = False
            kept[chosen] = True
        if not self.choice.padding and "is_padding" in axis:
            kept &= ~axis.label("is_padding").to_numpy().astype(np.bool_)
        for name, place in zip(self.variables, self.places, strict=True):
            if f"{name}_present" in dataset.variables:
                there = dataset.variables[f"{name}_present"].values
                kept &= there[place] if there.ndim > 1 else there
        if not kept.any():
            named = ", ".join(self.names)
            msg = f"{self.choice.path}: no row of {named} is chosen, there, and no padding"
            raise ConfigError(msg)
        return None if kept.all() else np.flatnonzero(kept)

    def _unit(self, variable: xr.Variable, axis: int) -> int:
        stored = variable.encoding.get("chunks")
        unit = int(stored[axis]) if stored else 1
        if _is_log(self.choice.path):
            row = int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize
            unit = max(_OF_A_LOG // max(row, 1), unit)
        return min(unit, self.rows)


def _is_log(path: Path | RemotePath) -> bool:
    if isinstance(path, RemotePath):
        return is_segmented(path)
    return path.is_file() and (is_log(path) or is_legacy(path))


def _resolve(
    dataset: xr.Dataset, choice: Choice
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """Give of each layer its variable, its name, and its place on ``layer``."""
    wanted = choice.layers
    if isinstance(wanted, str) and wanted in dataset.data_vars:
        modules = dataset[wanted].attrs.get("modules")
        if isinstance(modules, list | tuple):
            there = [place for place, one in enumerate(modules) if one]
            return (
                (wanted,) * len(there),
                tuple(modules[place] for place in there),
                tuple(there),
            )
    found = [
        dataset.actstore.layer(one, dim=choice.dim)
        for one in ([wanted] if isinstance(wanted, str) else wanted)
    ]
    blocks = dataset["layer"].values.tolist() if "layer" in dataset.coords else []
    places = [
        blocks.index(int(one.coords["layer"])) if "layer" in dataset[one.name].dims else 0
        for one in found
    ]
    names = tuple(one.attrs["modules"][0] for one in found)
    return tuple(str(one.name) for one in found), names, tuple(places)


def _check_alike(dataset: xr.Dataset, names: Sequence[str], dim: str) -> None:
    """Refuse layers that are no rows of one shape.

    Raises
    ------
    ConfigError
        They aren't.
    """
    kinds: Mapping[Any, None] = dict.fromkeys(
        (
            *(one.shape[one.dims.index(dim) + 1 :] if dim in one.dims else one.dims,),
            one.dtype.name,
        )
        for one in (dataset.variables[name] for name in names)
    )
    if len(kinds) > 1:
        said = ", ".join(f"{shape} {dtype}" for shape, dtype in kinds)
        msg = f"layers that are read together have rows of one shape and dtype; got {said}"
        raise ConfigError(msg)


def _label(axis: TokenAxis, name: str) -> NDArray[Any]:
    if name not in axis:
        msg = f"no label {name!r} on {axis.dim!r}; there are {', '.join(map(repr, axis.names))}"
        raise ConfigError(msg)
    values: NDArray[Any] = axis.label(name).to_numpy()
    if values.dtype.kind not in "biuf":
        msg = f"label {name!r} is text, and no tensor; token_id has the ids of token_text"
        raise ConfigError(msg)
    return values
