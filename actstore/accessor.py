"""Owns the accessor ``dataset.actstore``: rows by their tokens, layers by their names.

It goes by a dataset's variables, coordinates and attributes alone, whoever opened it. How values
are read is ``dataset.py``'s, ``stream.rows``'s and zarr's.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

import actstore
from actstore.archive.coordinates import ROW_LABELS, SOURCE_ROW, prefix_of
from actstore.archive.precision import CODING, EXACT, SCALE, Precision
from actstore.errors import ConfigError
from actstore.joining import MISSING, as_label, as_table, matches, picked
from actstore.layers import instead, layers_of, no_layer, sites_meant
from actstore.markup import Page

__all__ = [
    "ActstoreAccessor",
    "TokenAxis",
    "beneath_dask",
    "check_dataset",
    "lazy_beneath",
    "remember_lazy",
    "token_axes",
]

#: What a dask array keeps the lazy variable under that it reads from, and its own name then.
_LAZY: Final = "_actstore_lazy"
#: Rows of a label that are read at once: whole chunks of an archive.
_PIECE: Final = 1 << 22


@xr.register_dataset_accessor("actstore")  # type: ignore[no-untyped-call]
class ActstoreAccessor:
    """Rows and layers of a log's or an archive's dataset, by what they are.

    What chooses rows reads their labels, and gives a dataset of those rows that is as lazy as it
    was; so choices can follow each other. Of its values only the chunks that hold a chosen row
    are read, when they are asked for. With dask this holds for variables as they were opened or
    chosen: of what was sliced or computed with before, whole shards are read. Variables that
    don't have the token axis, ragged ones among them, stay as they are.

    ``dim`` is the token axis. It can be left out where there is one; an encoder-decoder has
    ``encoder_token`` and ``decoder_token``. Where it is no token axis, or is left out and there
    are several, all of these raise `ConfigError`.

    Parameters
    ----------
    dataset : xarray.Dataset
        As `actstore.open_dataset` gives it, or ``xarray.open_zarr`` of an archive.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    def tokens(
        self, wanted: str | int | Iterable[str | int], *, dim: str | None = None
    ) -> xr.Dataset:
        """Choose the rows whose input token is one of these.

        Parameters
        ----------
        wanted : str, int, or iterable of them
            Texts, and ids. A text also means itself behind a space, the form that it has within a
            sentence: ``"Paris"`` finds ``"Paris"`` and ``" Paris"``, but ``" Paris"`` only itself.
            ``where(token_text="Paris")`` finds ``"Paris"`` alone.
        dim : str, optional
            The token axis.

        Raises
        ------
        ConfigError
            Something wanted is neither a text nor an integer.
        """
        axis = self._axis(dim)
        texts, ids = _texts_and_ids(wanted)
        chosen = np.zeros(axis.rows, np.bool_)
        if texts:
            chosen |= axis.matching("token_text", texts)
        if ids:
            chosen |= axis.matching("token_id", ids)
        return axis.take(np.flatnonzero(chosen))

    def steps(
        self, selection: int | slice | Iterable[int] | None = None, *, dim: str | None = None
    ) -> xr.Dataset:
        """Choose the rows that predicted a recorded token, in the order of the steps.

        Of an archive of several logs, log by log.

        Parameters
        ----------
        selection : int, slice or iterable of int, optional
            Which steps, whatever their order here; all if it isn't given. A slice counts as in
            Python: ``slice(-5, None)`` is the last five.
        dim : str, optional
            The token axis.

        Raises
        ------
        ConfigError
            The selection is none of these.
        """
        axis = self._axis(dim)
        labels = [*axis.run, "step"]
        table = axis.table(labels)
        chosen = table["step"] >= 0
        if selection is not None:
            count = int(table["step"].max()) + 1 if axis.rows else 0
            chosen &= table["step"].isin(_step_numbers(selection, count))
        return axis.take(table[chosen].sort_values(labels, kind="stable").index.to_numpy())

    def last_positions(self, *, dim: str | None = None) -> xr.Dataset:
        """Choose the last row of each batch item in each pass that is not padding.

        Parameters
        ----------
        dim : str, optional
            The token axis.
        """
        axis = self._axis(dim)
        table = axis.table([*axis.run, "pass_index", "batch_item"])
        table = table.iloc[axis.as_captured(~axis.label("is_padding").to_numpy())]
        return axis.take(table.drop_duplicates(keep="last").index.to_numpy())

    def sequence(
        self, pass_index: int, item: int = 0, *, run: int | None = None, dim: str | None = None
    ) -> xr.Dataset:
        """Choose the rows of one batch item of one pass, padding included, as they were captured.

        Parameters
        ----------
        pass_index, item : int
            The pass, and the batch item, both from 0.
        run : int, optional
            The log, of an archive of several; each counts its passes by itself.
        dim : str, optional
            The token axis.

        Raises
        ------
        ConfigError
            There are no such rows, or they are of several logs, or are mixed with others.
        """
        axis = self._axis(dim)
        chosen = axis.matching("pass_index", pass_index) & axis.matching("batch_item", item)
        if run is not None:
            chosen &= axis.matching("run", run) if axis.run else run == 0
        rows = axis.as_captured(chosen)
        logs = axis.label("run")[rows].unique().tolist() if axis.run else []
        if len(logs) > 1:
            msg = f"pass {pass_index!r} is in each of the runs {logs}; say which with run="
            raise ConfigError(msg)
        if not rows.size:
            passes = axis.label("pass_index")
            found = f"passes {passes.min()} to {passes.max()}" if axis.rows else "no rows at all"
            msg = (
                f"there are no rows of pass {pass_index!r}, batch item {item!r} on {axis.dim!r}, "
                f"which has {found}; actstore.table() has the pass_index and batch_item of each"
            )
            raise ConfigError(msg)
        if not axis.stand_together(rows):
            msg = (
                f"other rows stand between those of pass {pass_index!r}, batch item {item!r} on "
                f"{axis.dim!r}: datasets of several logs were put together, of which each counts "
                "its passes by itself, or the rows into another order; "
                "actstore.compact([log, log]) makes a dataset whose label 'run' tells them apart"
            )
            raise ConfigError(msg)
        return axis.take(rows)

    def drop_padding(self, *, dim: str | None = None) -> xr.Dataset:
        """Choose the rows that are not padding.

        Parameters
        ----------
        dim : str, optional
            The token axis.
        """
        axis = self._axis(dim)
        return axis.take(np.flatnonzero(~axis.label("is_padding").to_numpy()))

    def where(
        self, labels: Mapping[str, Any] | None = None, /, *, dim: str | None = None, **more: Any
    ) -> xr.Dataset:
        """Choose the rows whose labels, annotations among them, are as told; all of them hold.

        Parameters
        ----------
        labels : mapping, optional
            Label -> what it must be, for those whose names are no keywords, or ``dim``.
        dim : str, optional
            The token axis. Labels say their axis by themselves where they are named in full:
            ``decoder_position``.
        **more
            Label -> a value that it must be equal to; a list or array of values of which it must
            be one; or a function that is given the column, a `pandas.Series`, and gives a bool
            for each row: ``where(token_text=lambda text: text.str.startswith(" P"))``.

        Raises
        ------
        ConfigError
            There is no such label, or a function gives something else.
        """
        chosen: dict[str, tuple[TokenAxis, NDArray[np.bool_]]] = {}
        for label, wanted in {**(labels or {}), **more}.items():
            axis = self._axis_of_label(label, dim)
            found = axis.matching(label, wanted)
            _, before = chosen.get(axis.dim, (axis, np.ones(axis.rows, np.bool_)))
            chosen[axis.dim] = axis, before & found
        dataset = self._dataset
        for axis, mask in chosen.values():
            dataset = _take(dataset, axis.dim, np.flatnonzero(mask))
        return dataset

    def table(self, *, dim: str | None = None) -> pd.DataFrame:
        """Give the labels of the rows as a table, without reading any value.

        Parameters
        ----------
        dim : str, optional
            The token axis.

        Returns
        -------
        pandas.DataFrame
            A row for each row of the axis, whose index is its place there; a column for each
            label. Text is of dtype object, or whatever pandas holds text in.
        """
        axis = self._axis(dim)
        return axis.table(axis.names).rename_axis(index=axis.dim)

    def join(
        self,
        table: pd.DataFrame | Mapping[str, Any],
        on: str | Iterable[str] | Mapping[str, str],
        *,
        columns: Iterable[str] | None = None,
        rename: Mapping[str, str] | None = None,
        suffix: str = "",
        fill: Mapping[str, Any] | None = None,
        matched: str | None = None,
        dim: str | None = None,
    ) -> xr.Dataset:
        """Bring the columns of a table of yours to the rows, as further labels.

        Every row stays, in its place. One that no line of the table is of has NaN, or ``""`` of
        text; for that, bools (true is 1) and integers become float64. So do cells that the table
        lacks. ``fill`` keeps a column's dtype.

        Parameters
        ----------
        table : pandas.DataFrame or mapping
            Columns of text, numbers or bools; of a mapping, each is a list or an array. Named
            levels of a DataFrame's index count as columns.
        on : str, iterable of str, or mapping
            The labels that tell which line of the table a row is of, together, such as
            ``"sample_id"`` or ``["pass_index", "batch_item"]``: columns of the same name have
            their values. A mapping is label -> column.
        columns : iterable of str, optional
            The columns that are wanted; all others than those of ``on`` if it isn't given.
        rename : mapping, optional
            Column -> the name of its label. Labels of ``decoder_token`` get ``decoder_`` before.
        suffix : str
            What is put behind the names of all others.
        fill : mapping, optional
            Column -> its value on the rows that have none.
        matched : str, optional
            The name of one more label: whether the row is of a line of the table.
        dim : str, optional
            The token axis. Labels say their axis by themselves where they are named in full:
            ``decoder_position``.

        Returns
        -------
        xarray.Dataset
            The dataset, as lazy as before, with the labels; `actstore.add_coordinates` writes
            them into an archive.

        Raises
        ------
        ConfigError
            There is no such label or column; several lines of the table are of the same row; a
            column and its label can't be equal; a name is taken; or, of several logs, what each
            of them counts by itself is not joined by ``run`` too.
        """
        keys = _keys(on)
        axes = [self._axis_of_label(label, dim) for label in keys]
        axis = axes[0]
        if any(one.dim != axis.dim for one in axes):
            msg = f"{', '.join(map(repr, keys))} are labels of several token axes"
            raise ConfigError(msg)
        axis.check_runs(keys)
        lines = as_table(table)
        wanted = _columns(lines, keys, columns)
        named = {column: (rename or {}).get(column, column + suffix) for column in wanted}
        odd = [one for one in (*(rename or {}), *(fill or {})) if one not in wanted]
        if odd:
            msg = f"rename and fill are of columns that are joined, {wanted!r}; got {odd!r}"
            raise ConfigError(msg)
        names = axis.new_names([*named.values(), *(() if matched is None else (matched,))])
        place = matches(
            [axis.label(label) for label in keys], [lines[one] for one in keys.values()], [*keys]
        )
        found: dict[str, NDArray[Any]] = {}
        for column, name in zip(wanted, names, strict=False):
            blank = (fill or {}).get(column, MISSING)
            found[name] = picked(as_label(lines[column], column, blank), place, column, blank)
        if matched is not None:
            found[names[-1]] = place >= 0
        return self._dataset.assign_coords(
            {name: (axis.dim, values) for name, values in found.items()}
        )

    def decode(self) -> xr.Dataset:
        """Give the values of variables that are stored as codes, of an archive that others opened.

        `actstore.open_dataset` has done so. As lazy as the dataset, where that has dask arrays;
        else the codes are read.

        Returns
        -------
        xarray.Dataset
            Without the scales, and the rows without codes.
        """
        found, parts = {}, set[str]()
        for name, array in self._dataset.data_vars.items():
            if Precision.parse(array.attrs.get("precision", "float16")).coded:
                found[name] = _decoded(self._dataset, str(name))
                parts |= {f"{name}{end}" for end in (SCALE, EXACT, f"{EXACT}_present")}
        parts &= {*map(str, self._dataset.variables)}
        return self._dataset.assign(found).drop_vars(parts)

    def explore(
        self,
        *,
        max_tokens: int = 400,
        sequence: tuple[int, int] | None = None,
        max_memory_gb: float = 1.0,
    ) -> Page:
        """Show the dataset as a page in a notebook; see `actstore.explore`.

        Parameters
        ----------
        max_tokens : int, optional
            The most tokens that are shown.
        sequence : (int, int), optional
            The pass and the batch item with which they begin.
        max_memory_gb : float, optional
            What may be held, in 10^9 bytes.

        Returns
        -------
        Page
            Which a notebook shows inline; ``html`` is the page.

        Raises
        ------
        ConfigError
            There is no such sequence, or an option is none.
        """
        # by its public name: what makes pages stands above what opens datasets
        return actstore.explore(
            self._dataset, max_tokens=max_tokens, sequence=sequence, max_memory_gb=max_memory_gb
        )

    @property
    def layers(self) -> dict[str, str]:
        """The names of the layers that have rows, and the variable that holds each."""
        found: dict[str, str] = {}
        for one in layers_of(self._dataset, token_axes(self._dataset)):
            found.setdefault(one.name, one.variable)
        return found

    def layer(self, name: str, *, dim: str | None = None) -> xr.DataArray:
        """Give the rows of one layer.

        Parameters
        ----------
        name : str
            The layer's own (``model.layers.3.mlp``), TransformerLens' (``blocks.3.hook_mlp_out``),
            or the site of a layer outside of blocks (``final_norm``). A layer that isn't stored,
            since its site is an alias, is found by its name if the site is a dotted path, or by
            TransformerLens'.
        dim : str, optional
            The token axis, of a layer that has rows on both (the embedding of an
            encoder-decoder).

        Returns
        -------
        xarray.DataArray
            (token, feature) for most; without the dimension ``layer``, whose coordinates stay as
            scalars. Of a layer that is in several variables (it is called twice in a pass, or
            changes its dtype or width), that with the site's own name.

        Raises
        ------
        ConfigError
            There is no such layer, it has no rows, or it has rows on several axes and ``dim`` is
            left out.
        """
        dataset = self._dataset
        layers = layers_of(dataset, token_axes(dataset))
        meant = sites_meant(name, dataset.attrs.get("aliases", {}))
        held = [one for one in layers if one.name == name]
        held = held or [one for one in layers if (one.site, one.block) in meant]
        if dim is not None:
            held = [one for one in held if one.axis == self._axis(dim).dim]
        if not held:
            raise ConfigError(no_layer(dataset, name, list(self.layers)))
        axes = dict.fromkeys(one.axis for one in held)
        if len(axes) > 1:
            msg = f"{name!r} has rows on {', '.join(map(repr, axes))}; say on which with dim"
            raise ConfigError(msg)
        found = held[0]
        array = dataset[found.variable]
        rows = array.isel(layer=found.place) if "layer" in array.dims else array
        return rows.assign_attrs(modules=[found.name])

    def _axis(self, dim: str | None) -> TokenAxis:
        axes = token_axes(self._dataset)
        if dim is None and len(axes) == 1:
            return next(iter(axes.values()))
        if dim is None or dim not in axes:
            raise ConfigError(_no_axis(self._dataset, axes, dim))
        return axes[dim]

    def _axis_of_label(self, label: str, dim: str | None) -> TokenAxis:
        """Give the token axis that a label is on, by ``dim`` or by its full name."""
        axes = token_axes(self._dataset)
        if dim is not None or not axes:
            axes = {str(dim): self._axis(dim)}
        found = [axis for axis in axes.values() if label in axis]
        if len(found) > 1:
            raise ConfigError(_no_axis(self._dataset, axes, dim))
        if not found:
            names = [name for axis in axes.values() for name in axis.names]
            msg = f"no label {label!r} on {', '.join(map(repr, axes))}; {instead(label, names)}"
            raise ConfigError(msg)
        return found[0]


@dataclass(frozen=True, slots=True, eq=False)
class TokenAxis:
    """A token axis of a dataset: what its labels' names begin with, and all of these names."""

    dataset: xr.Dataset
    dim: str
    prefix: str
    names: tuple[str, ...]

    def __contains__(self, label: str) -> bool:
        return self.prefix + label in self.names or label in self.names

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.dataset.sizes[self.dim]

    def label(self, label: str) -> pd.Series:
        """Read a label, by its name with the prefix or without."""
        return _series(self.variable(label).values)

    def matching(self, label: str, wanted: Any) -> NDArray[np.bool_]:
        """Tell which rows' label is equal to a value, in a list, or satisfies a function.

        A column of very many rows is read piece by piece, but for a function, which gets all.
        """
        if callable(wanted):
            return _satisfying(self.label(label), wanted)
        variable, values = self.variable(label), wanted
        if not pd.api.types.is_list_like(wanted):
            values = [wanted]
        found = np.zeros(self.rows, np.bool_)
        for first in range(0, self.rows, _PIECE):
            rows = slice(first, first + _PIECE)
            part = variable.values if self.rows <= _PIECE else variable[rows].values
            found[rows] = _series(part).isin(list(values))
        return found

    def variable(self, label: str) -> xr.Variable:
        """Give a label's variable, by its name with the prefix or without."""
        full = self.prefix + label
        return self.dataset.variables[full if full in self.names else label]

    @property
    def run(self) -> tuple[str, ...]:
        """The label that tells several logs apart, where there are several."""
        return ("run",) if len(self.dataset.attrs.get("runs", ())) > 1 and "run" in self else ()

    @property
    def source(self) -> NDArray[np.int64]:
        """What rises with the rows as they were captured, whatever their order here."""
        if SOURCE_ROW in self:
            return np.asarray(self.label(SOURCE_ROW).to_numpy(), np.int64)
        return np.arange(self.rows)

    def as_captured(self, chosen: NDArray[np.bool_] | pd.Series) -> NDArray[np.int64]:
        """Give the rows that are chosen, in the order that they were captured in."""
        rows = np.flatnonzero(chosen)
        return rows[np.argsort(self.source[rows], kind="stable")] if SOURCE_ROW in self else rows

    def stand_together(self, rows: NDArray[np.int64]) -> bool:
        """Whether rows, as they were captured, are all from the first to the last, each once."""
        source = self.source
        mine = source[rows]
        between = (source >= mine[0]) & (source <= mine[-1])
        return bool(np.count_nonzero(between) == rows.size and np.all(np.diff(mine) > 0))

    def check_runs(self, labels: Iterable[str]) -> None:
        """Refuse labels that each of several logs counts by itself, unless ``run`` is with them.

        Raises
        ------
        ConfigError
            They are.
        """
        full = {self.prefix + one if self.prefix + one in self.names else one for one in labels}
        counted = full & {self.prefix + one for one in ("pass_index", "step")}
        if counted and self.run and self.prefix + "run" not in full:
            logs = self.label("run").unique().tolist()
            if len(logs) > 1:
                named = ", ".join(map(repr, sorted(counted)))
                msg = f"{named} count in each of the runs {logs} by themselves: give 'run' too"
                raise ConfigError(msg)

    def new_names(self, wanted: Iterable[str]) -> list[str]:
        """Give the full names of new labels.

        Raises
        ------
        ConfigError
            One is taken.
        """
        known = {str(one) for one in (*self.dataset.variables, *self.dataset.dims)}
        names = []
        for one in wanted:
            name = one if one.startswith(self.prefix) else self.prefix + one
            if name in known or f"_{name}".endswith("_pass_index"):
                msg = f"the name {name!r} is taken; give another, with rename or suffix"
                raise ConfigError(msg)
            known.add(name)
            names.append(name)
        return names

    def table(self, labels: Iterable[str]) -> pd.DataFrame:
        """Read labels as the columns of a table."""
        return pd.DataFrame({label: self.label(label) for label in labels})

    def take(self, rows: NDArray[np.int64]) -> xr.Dataset:
        """Give the dataset with these rows."""
        return _take(self.dataset, self.dim, rows)


def check_dataset(given: object) -> None:
    """Refuse what is no dataset.

    Raises
    ------
    ConfigError
        It is none.
    """
    if not isinstance(given, xr.Dataset):
        said = repr(given) if isinstance(given, str | os.PathLike) else type(given).__name__
        msg = f"wanted an xarray.Dataset, as actstore.open_dataset gives it; got {said}"
        raise ConfigError(msg)


def token_axes(dataset: xr.Dataset) -> dict[str, TokenAxis]:
    """Find the token axes: the dimensions whose rows have a pass."""
    labels: dict[str, list[str]] = {}
    for name in dataset.coords:
        dims = dataset.variables[name].dims
        if len(dims) == 1 and name != dims[0]:
            labels.setdefault(str(dims[0]), []).append(str(name))
    axes = {}
    for dim, names in labels.items():
        prefix = prefix_of(names)
        if prefix is not None:
            known = [prefix + one for one in ROW_LABELS if prefix + one in names]
            axes[dim] = TokenAxis(dataset, dim, prefix, tuple(dict.fromkeys(known + names)))
    return axes


# -- rows ---------------------------------------------------------------------------------------


def remember_lazy(chunked: xr.Dataset, lazy: xr.Dataset) -> xr.Dataset:
    """Let the dask arrays of a dataset know the lazy variables that they read.

    Dask reads whole chunks of its own, of about 64 MiB, however few rows are picked out of them;
    rows picked from the lazy variable cost only the chunks that they are in.
    """
    for name, variable in chunked.variables.items():
        beneath = lazy.variables[name]
        if variable.chunks is not None and beneath.chunks is None:
            setattr(variable.data, _LAZY, (variable.data.name, beneath))
    return chunked


def lazy_beneath(variable: xr.Variable) -> xr.Variable | None:
    """Give the lazy variable that a dask array reads, if it is still as it was opened."""
    if variable.chunks is None:
        return None
    name, lazy = getattr(variable.data, _LAZY, (None, None))
    # assigning to a part of a dask array changes its name
    if lazy is None or name != variable.data.name or lazy.dims != variable.dims:
        return None
    found: xr.Variable = lazy.copy(deep=False)
    found.attrs, found.encoding = variable.attrs, variable.encoding
    return found


def beneath_dask(dataset: xr.Dataset) -> xr.Dataset:
    """Give a dataset with the lazy variables that its dask arrays read, if they still do."""
    lazy = {name: lazy_beneath(one) for name, one in dataset.variables.items()}
    return dataset.assign({name: one for name, one in lazy.items() if one is not None})


def _take(dataset: xr.Dataset, dim: str, rows: NDArray[np.int64]) -> xr.Dataset:
    """Pick rows of one dimension; what dask reads is picked first and then chunked as it was."""
    beneath = {
        name: lazy
        for name, variable in dataset.variables.items()
        if dim in variable.dims and (lazy := lazy_beneath(variable)) is not None
    }
    chosen = dataset.assign(beneath).isel({dim: _index(rows)})
    chunked = {
        name: chosen.variables[name].chunk(
            {dim: sizes[0] for dim, sizes in dataset.variables[name].chunksizes.items()}
        )
        for name in beneath
    }
    return remember_lazy(chosen.assign(chunked), chosen)


def _index(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Give rows that follow each other as a slice, which every array picks without copying."""
    if not rows.size:
        return slice(0, 0)
    if np.all(np.diff(rows) == 1):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _keys(on: Any) -> dict[str, str]:
    """Give the labels to join by, and their columns."""
    if isinstance(on, Mapping):
        keys = dict(on)
    else:
        given = [on] if isinstance(on, str) else list(on)
        keys = dict(zip(given, given, strict=True))
    if not keys or not all(isinstance(one, str) for one in (*keys, *keys.values())):
        msg = f"on must be labels, or label -> column; got {on!r}"
        raise ConfigError(msg)
    return keys


def _columns(
    table: pd.DataFrame, keys: Mapping[str, str], wanted: Iterable[str] | None
) -> list[str]:
    """Give the columns of a table that are joined."""
    known = table.columns.tolist()
    wanted = [wanted] if isinstance(wanted, str) else wanted
    left = [one for one in known if one not in keys.values()]
    chosen = left if wanted is None else list(dict.fromkeys(wanted))
    for one in (*keys.values(), *chosen):
        if one not in known:
            msg = f"the table has no column {one!r}; {instead(one, known)}"
            raise ConfigError(msg)
    return chosen


def _texts_and_ids(wanted: Any) -> tuple[list[str], list[int]]:
    texts, ids = [], []
    for one in wanted if pd.api.types.is_list_like(wanted) else [wanted]:
        if isinstance(one, str):
            texts.append(one)
            if one and not one[0].isspace():
                texts.append(f" {one}")
        else:
            ids.append(_integer(one, "a token is a text, or an integer, its id"))
    return texts, ids


def _step_numbers(selection: Any, count: int) -> list[int]:
    if isinstance(selection, slice):
        return list(range(*selection.indices(count)))
    wanted = selection if pd.api.types.is_list_like(selection) else [selection]
    return [_integer(one, "steps are chosen by an integer, a slice or integers") for one in wanted]


def _integer(value: Any, wanted: str) -> int:
    with suppress(TypeError):
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    msg = f"{wanted}; got {value!r}"
    raise ConfigError(msg)


def _series(values: NDArray[Any]) -> pd.Series:
    # pandas has no dtype for NumPy's strings
    return pd.Series(values.astype(object) if values.dtype.kind == "T" else values)


def _satisfying(column: pd.Series, wanted: Callable[[pd.Series], Any]) -> NDArray[np.bool_]:
    found = np.asarray(wanted(column))
    if found.shape != column.shape or found.dtype != np.bool_:
        msg = (
            f"the function for a label must give a bool for each of its {column.size} values; "
            f"got {found.dtype} of shape {found.shape}: it is given all of them, as a Series"
        )
        raise ConfigError(msg)
    return found


# -- what to say --------------------------------------------------------------------------------


def _decoded(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Give the values of codes, and of rows that have none; xarray may have done the former."""
    values = dataset[name]
    said = {key: one for key, one in values.attrs.items() if key not in CODING}
    wide = np.dtype("f8" if said["source_dtype"] == "float64" else "f4")
    if "code_offset" in values.attrs:
        step = dataset[f"{name}{SCALE}"].astype(wide)
        numbers = values.astype(wide) - wide.type(values.attrs["code_offset"])
        values = (numbers * step).where(values != 0)
    elif "scale_factor" in values.attrs:
        numbers = values * values.attrs["scale_factor"] + values.attrs["add_offset"]
        values = numbers.where(values != 0)
    if f"{name}{EXACT}" in dataset:
        values = values.where(values.notnull(), dataset[f"{name}{EXACT}"])
    found: xr.DataArray = values.astype(wide).drop_attrs().assign_attrs(said)
    return found


def _no_axis(dataset: xr.Dataset, axes: Iterable[str], dim: str | None) -> str:
    """Say what ``dim`` must be."""
    names = ", ".join(map(repr, axes))
    if not names:
        dims = ", ".join(map(repr, dataset.sizes))
        return f"this dataset has no token axis, a dimension with pass_index; it has {dims}"
    return f"dim must be one of the token axes, {names}; got {dim!r}"
