"""Owns which rows of a variable are looked at, and how they are read: block by block, lazily.

What is made of the blocks is the business of the statistics; they are given arrays, and no names.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.accessor import check_dataset, lazy_beneath, token_axes
from actstore.analysis.engine import Budget
from actstore.errors import ConfigError

__all__ = ["Source", "blocks_of", "flat", "labelled", "source_of", "sources"]

#: What is read at once: three chunks of an archive, which are still in the cache when they are
#: looked at. Reading a chunk at a time took 1.5 times as long as three, for what a read costs
#: besides.
_BLOCK_BYTES: Final = 3 << 20
_LEAST_ROWS: Final = 32  # of a block, where a row is wide
_TASK_BYTES: Final = 64 << 20
_MOST_TASKS: Final = 1 << 16  # of a variable: a scheduler keeps a few kB of each
_COPIES: Final = 8  # of a block: read, picked, widened, and what is made of it


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The rows of a variable that are looked at.

    Attributes
    ----------
    name : str
        The variable's.
    array : xarray.DataArray
        As it is in the dataset: its labels and attributes.
    variable : xarray.Variable
        What is read, as lazily as it can be: ``([layer,] token, …)``.
    dim : str
        The token axis.
    places : tuple of int or None
        The places on ``layer`` that are looked at; a None where there is no ``layer``.
    keep : numpy.ndarray
        bool [layers, rows]: the rows that are looked at.
    padding, missing : int
        Rows that are not, since they are padding; and since they are not there (a layer's row
        each).
    """

    name: str
    array: xr.DataArray
    variable: xr.Variable
    dim: str
    places: tuple[int | None, ...]
    keep: NDArray[np.bool_]
    padding: int
    missing: int

    @property
    def rows(self) -> int:
        """The rows of the token axis."""
        return int(self.keep.shape[1])

    @property
    def trailing(self) -> tuple[Hashable, ...]:
        """The dimensions behind the token axis."""
        return self.variable.dims[self.variable.dims.index(self.dim) + 1 :]

    @property
    def layer_dims(self) -> tuple[str, ...]:
        """``layer``, where there is one."""
        return () if self.places == (None,) else ("layer",)

    @property
    def width(self) -> int:
        """The elements of a row."""
        return int(np.prod([self.variable.sizes[dim] for dim in self.trailing], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        """The bytes of a row, as it is stored."""
        return max(self.width * int(self.variable.dtype.itemsize), 1)

    def about(self) -> dict[str, int]:
        """Say how many rows a result is of, and how many it leaves out."""
        return {
            "rows": int(self.keep.any(axis=0).sum()),
            "padding_left_out": self.padding,
            "missing_left_out": self.missing,
        }

    def grid(self, budget: Budget, rows: int = 0) -> tuple[int, int]:
        """Give the rows of a block, and of a task: whole chunks, and whole shards.

        Parameters
        ----------
        budget : Budget
            What there is.
        rows : int, optional
            The rows that a block had better have.

        Raises
        ------
        ConfigError
            What must be read at once doesn't fit.
        """
        axis = self.variable.dims.index(self.dim)
        stored = self.variable.encoding.get("chunks"), self.variable.encoding.get("shards")
        chunk, shard = (int(one[axis]) if one else 1 for one in stored)
        most = budget.bytes_each // (_COPIES * max(self.row_bytes, self.width * 8))
        if self.variable.chunks is not None:  # dask reads its own chunks, whole
            chunk = max(1, *self.variable.chunks[axis])
            layers = max(self.variable.chunks[0]) if axis else 1
            if chunk * layers > budget.bytes_each // (2 * self.row_bytes):
                raise ConfigError(self._too_large(chunk * layers, budget))
            return max(min(chunk, most), 1), chunk
        if chunk > max(most, 1) * 2 or most < 1:
            raise ConfigError(self._too_large(chunk, budget))
        wanted = max(_BLOCK_BYTES // self.row_bytes, _LEAST_ROWS, rows)
        block = max(min(wanted, most) // chunk, 1) * chunk
        fewest = len(self.places) * self.rows // _MOST_TASKS
        task = max(shard, _TASK_BYTES // self.row_bytes, block, fewest)
        return block, -(-task // max(shard, block)) * max(shard, block)

    def _too_large(self, chunk: int, budget: Budget) -> str:
        return (
            f"max_memory_gb={budget.gigabytes!r} for {budget.workers} workers is too little for "
            f"{self.name!r}: {chunk} rows of {self.row_bytes} bytes are read at once, several "
            "times over; give more, fewer workers, or open the dataset with chunks=None"
        )

    def parts(self, place: int | slice | None, task: int) -> Iterator[xr.Variable]:
        """Give the rows of a layer, of some, or of all, in pieces that nothing is read of yet."""
        for first in range(0, max(self.rows, 1), task):
            rows = slice(first, min(first + task, self.rows))
            yield self.variable[rows if place is None else (place, rows)]


def sources(
    dataset: xr.Dataset,
    variables: str | Iterable[str] | None,
    *,
    padding: bool,
) -> list[Source]:
    """Find the variables that have rows, and which rows of them are looked at.

    Parameters
    ----------
    dataset : xarray.Dataset
        As it was opened, or chosen from that.
    variables : str, iterable of str, or None
        Which; None: all floating ones that have a token axis.
    padding : bool
        Whether padding is looked at too.

    Raises
    ------
    ConfigError
        It is no dataset; there is no such variable, it has no token axis, or its values aren't
        numbers.
    """
    check_dataset(dataset)
    axes = token_axes(dataset)
    rows = {str(name): _axis_of(one, axes) for name, one in dataset.data_vars.items()}
    known = [name for name, dim in rows.items() if dim is not None]
    if variables is None:
        chosen = [name for name in known if dataset[name].dtype.kind == "f"]
    else:
        chosen = [variables] if isinstance(variables, str) else list(variables)
    if not chosen:
        msg = f"there is no variable to look at; with rows of a token axis there are {known}"
        raise ConfigError(msg)
    codes = [
        name
        for name in (known if variables is None else chosen)
        if name in dataset
        and "precision" in dataset[name].attrs
        and dataset[name].dtype.kind in "iu"
    ]
    if codes:
        msg = f"{', '.join(codes)}: stored as codes; dataset.actstore.decode() gives the values"
        raise ConfigError(msg)
    for name in chosen:
        if rows.get(name) is None:
            msg = f"{name!r} is no variable with rows of a token axis; there are {known}"
            raise ConfigError(msg)
        kind = dataset[name].dtype.kind
        if kind not in "fiub":
            msg = (
                f"{name!r} is of dtype {dataset[name].dtype}; statistics are of real numbers: "
                "assign its .real, .imag or abs() as a variable, and name that"
            )
            raise ConfigError(msg)
    return [_source(dataset, name, str(rows[name]), padding) for name in chosen]


def source_of(dataset: xr.Dataset, variable: Any, *, padding: bool = False) -> Source:
    """Give one variable's rows; raises as `sources` does."""
    if not isinstance(variable, str):
        msg = f"variable must be the name of one; got {variable!r}"
        raise ConfigError(msg)
    (found,) = sources(dataset, variable, padding=padding)
    return found


def _axis_of(array: xr.DataArray, axes: Mapping[str, Any]) -> str | None:
    """Give the token axis of a variable of values; None of what is none."""
    name = str(array.name)
    found = [str(dim) for dim in array.dims if dim in axes]
    return found[0] if len(found) == 1 and not name.endswith("_present") else None


def _source(dataset: xr.Dataset, name: str, dim: str, padding: bool) -> Source:
    array = dataset[name]
    variable = dataset.variables[name]
    beneath = lazy_beneath(variable)
    variable = variable if beneath is None else beneath
    front = [one for one in ("layer", dim) if one in variable.dims]
    order = [*front, *(one for one in variable.dims if one not in front)]
    if tuple(order) != variable.dims:
        encoding = variable.encoding
        turned = [variable.dims.index(one) for one in order]
        variable = variable.transpose(*order)
        variable.encoding = {
            key: tuple(encoding[key][place] for place in turned)
            for key in ("chunks", "shards")
            if encoding.get(key)
        }
    layers = variable.sizes["layer"] if "layer" in variable.dims else None
    there = np.ones((1 if layers is None else layers, variable.sizes[dim]), np.bool_)
    if f"{name}_present" in dataset:
        present = dataset.variables[f"{name}_present"]
        there &= present.transpose(*(one for one in front if one in present.dims)).values
    axis = token_axes(dataset)[dim]
    real = np.ones(there.shape[1], np.bool_)
    if not padding and "is_padding" in axis:
        real = ~axis.label("is_padding").to_numpy().astype(np.bool_)
    places = (None,) if layers is None else tuple(range(layers))
    missing = int((~there & real).sum())
    return Source(name, array, variable, dim, places, there & real, int((~real).sum()), missing)


def blocks_of(
    values: xr.Variable, keep: NDArray[np.bool_], step: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Read the rows of a piece of one layer, a block at a time.

    Parameters
    ----------
    values : xarray.Variable
        (token, …), lazy or not.
    keep : numpy.ndarray
        bool [rows]: those that are wanted.
    step : int
        Rows of a block.

    Yields
    ------
    rows : numpy.ndarray
        int64 [n]: their places in the piece.
    block : numpy.ndarray
        [n, width], C-contiguous; not to be written to.
    """
    for first in range(0, keep.size, step):
        mine = keep[first : first + step]
        if not mine.any():
            continue
        block = flat(values[first : first + step])
        rows = np.flatnonzero(mine)
        yield rows + first, block if rows.size == mine.size else block[rows]


def flat(values: xr.Variable) -> NDArray[Any]:
    """Read rows, and give them as [n, width]; float16 as float32, which has its values."""
    found = np.ascontiguousarray(values.values)
    if found.dtype == np.float16:
        found = found.astype(np.float32)
    return found.reshape(found.shape[0], int(np.prod(found.shape[1:], dtype=np.int64)))


def labelled(
    source: Source,
    dims: Iterable[Hashable],
    values: Any,
    attributes: Mapping[str, Any],
    labels: xr.DataArray | None = None,
) -> xr.DataArray:
    """Give an array the coordinates that the variable, or another array, has on its dimensions."""
    dims = tuple(dims)
    found = xr.DataArray(values, dims=dims, attrs=dict(attributes))
    coordinates = {
        name: one.variable
        for name, one in (source.array if labels is None else labels).coords.items()
        if set(one.dims) <= set(dims)
        and all(one.sizes[dim] == found.sizes[dim] for dim in one.dims)
    }
    return found.assign_coords(coordinates)
