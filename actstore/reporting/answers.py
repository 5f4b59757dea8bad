"""Owns what a served page may ask of a dataset, and how much of it: every answer is bounded.

Sequences, the labels of their tokens, norms, features and distributions, each read when it is
asked for; how a question comes in and an answer goes out is ``serving``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.accessor import token_axes
from actstore.analysis.source import Source, flat, source_of
from actstore.errors import ConfigError
from actstore.reporting.sequences import Sequences
from actstore.reporting.values import (
    FAULTS,
    Found,
    Limits,
    about,
    begin_of,
    feature_labels,
    finite,
    label_of,
    labels_of,
    no_sequence,
    on_strip,
    runs_of,
    sampled,
    shown_sources,
)

__all__ = ["Answers", "RefusedError"]

MOST_SEQUENCES: Final = 100  # of an answer
FEATURES: Final = 8  # of a layer, that differ most
_TOGETHER_BYTES: Final = 32 << 20  # of several layers' rows, that one answer is of
_SAMPLE_BYTES: Final = 64 << 20
_SHOWN: Final = 100  # characters of what was asked, in a refusal

Ints = NDArray[np.int64]


class RefusedError(ConfigError):
    """What is asked can't be answered.

    Parameters
    ----------
    wanted : str
        What would have been answered.
    found : Any
        What was asked.
    status : int, optional
        HTTP's.
    """

    def __init__(self, wanted: str, found: Any, status: int = 400) -> None:
        text = str(found)
        self.wanted = wanted
        self.found = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
        self.status = status
        super().__init__(f"wanted {wanted}; got {self.found!r}")


class Answers:
    """Answers what a page asks of a dataset.

    Parameters
    ----------
    dataset : xarray.Dataset
        As `actstore.open_dataset` gives it with ``chunks=None``; it stays open.
    limits : Limits
        The most tokens of an answer, the sequence that is shown first, and what one answer may
        hold of the values.
    tell : function
        Takes, in words, what can't be read; who asks isn't told why.

    Raises
    ------
    ConfigError
        There is no such sequence.
    """

    def __init__(
        self, dataset: xr.Dataset, limits: Limits, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self._dataset = dataset
        self._limits = limits
        self._tell = tell
        self._axes = token_axes(dataset)
        self._found = Found()
        # of no rows, so that nothing that grows with them is held
        empty = dataset.isel({dim: slice(0, 0) for dim in self._axes})
        self._sources: dict[str, Source] = {}
        for source in shown_sources(empty, self._found):
            said = about(source)
            self._sources.setdefault(said["name"], source)
            self._found.variables.append(said | self._more(source))
        dims = {source.dim for source in self._sources.values()} or set(self._axes)
        self._sequences = {dim: Sequences.of(self._axes[dim]) for dim in self._axes if dim in dims}
        self._distributions: dict[str, dict[str, Any]] = {}
        self._begun = self._begins()

    def _more(self, source: Source) -> dict[str, Any]:
        """Say what else has to be known of a variable to ask for it."""
        labels = feature_labels(source)
        numbered = labels.dtype.kind in "iu" and labels.size > 0
        layers = max(len(source.places), 1)
        return {
            "cut": not source.places or not self._axes[source.dim].rows,
            "width": source.width,
            "least": int(labels.min()) if numbered else 0,
            "most": int(labels.max()) if numbered else max(source.width - 1, 0),
            "together": max(
                min(layers, _TOGETHER_BYTES // (self._limits.max_tokens * source.row_bytes)), 1
            ),
        }

    def _begins(self) -> dict[str, tuple[int, int] | None]:
        wanted = self._limits.sequence
        found = {dim: begin_of(one, wanted) for dim, one in self._sequences.items()}
        if wanted is not None and found and not any(found.values()):
            raise ConfigError(no_sequence(self._axes[next(iter(found))], *wanted))
        if wanted is not None:
            found = {dim: one or begin_of(self._sequences[dim], None)
                     for dim, one in found.items()}  # fmt: skip
        return found

    def outline(self, _dataset: xr.Dataset | None = None) -> dict[str, Any]:
        """Say what can be asked: ``variables``, ``served`` and ``notes``; no values are read."""
        axes = {}
        for dim, known in self._sequences.items():
            begun = self._begun[dim]
            number, first = begun or (0, 0)
            axes[dim] = {"sequences": len(known), "sequence": number, "first": first}
        return {
            "variables": self._found.variables,
            "strips": {},
            "notes": list(self._found.notes),
            "served": {"axes": axes, "tokens": self._limits.max_tokens},
        }

    # -- what is asked ----------------------------------------------------------------------------

    def sequences(self, axis: str, first: int, count: int) -> dict[str, Any]:
        """List sequences of a token axis, ``count`` from ``first`` on."""
        known = self._known(axis)
        _within("count", count, 1, MOST_SEQUENCES)
        _within("first", first, 0, max(len(known) - 1, 0), 404)
        numbers = range(first, min(first + count, len(known)))
        return {"of": len(known), "sequences": [known.about(one) for one in numbers]}

    def tokens(self, axis: str, sequence: int, first: int, count: int) -> dict[str, Any]:
        """Give the labels of tokens of a sequence."""
        rows = self._rows(axis, sequence, first, count)
        with self._reading(axis):
            said = labels_of(self._axes[axis], rows, Found())
        return said | {"about": self._known(axis).about(sequence), "first": first}

    def layer(
        self, variable: str, layer: int, sequence: int, first: int, count: int
    ) -> dict[str, Any]:
        """Give a layer's norms of tokens, and the features that differ most in them."""
        source = self._source(variable)
        rows = self._rows(source.dim, sequence, first, count)
        part = self._part(variable, rows, layer, 1)
        with self._reading(variable):
            said = on_strip(part, np.arange(rows.size), FEATURES, self._limits)
        return {"norms": said["norms"][0], "features": said["features"][0]}

    def norms(
        self, variable: str, layer: int, layers: int, sequence: int, first: int, count: int
    ) -> dict[str, Any]:
        """Give the norms of tokens in some layers."""
        source = self._source(variable)
        rows = self._rows(source.dim, sequence, first, count)
        fits = max(_TOGETHER_BYTES // (rows.size * source.row_bytes), 1)
        _within("layers", layers, 1, min(fits, max(len(source.places), 1)))
        part = self._part(variable, rows, layer, layers)
        with self._reading(variable):
            return {"norms": on_strip(part, np.arange(rows.size), 0, self._limits)["norms"]}

    def feature(
        self, variable: str, layer: int, feature: int, sequence: int, first: int, count: int
    ) -> dict[str, Any]:
        """Give the values of a feature, by its label or its place, in a layer."""
        source = self._source(variable)
        rows = self._rows(source.dim, sequence, first, count)
        labels = feature_labels(source)
        place = _place_of(feature, labels)
        part = self._part(variable, rows, layer, 1)
        with self._reading(variable):
            values = self._column(part, place)
            values[~part.keep[0]] = np.nan
        return {"feature": label_of(labels[place]), "values": finite(values)}

    def distribution(self, variable: str) -> dict[str, Any]:
        """Say how the values of each layer of a variable are distributed, in a sample of rows."""
        source = self._source(variable)
        total = self._axes[source.dim].rows
        if not total:
            raise RefusedError("a variable with rows", variable, 404)
        if variable not in self._distributions:
            runs = runs_of(source, total, _SAMPLE_BYTES, self._limits)
            rows = np.concatenate([np.arange(one.start, one.stop) for one in runs])
            with self._reading(variable):
                part = self._part(variable, rows, 0, max(len(source.places), 1))
                said = sampled(part, _SAMPLE_BYTES, self._limits)
            self._distributions[variable] = said | {"sample": said["sample"] | {"of": total}}
        return self._distributions[variable]

    # -- what is read -----------------------------------------------------------------------------

    def _known(self, axis: str) -> Sequences:
        if axis not in self._sequences:
            raise RefusedError(f"an axis of {sorted(self._sequences)}", axis, 404)
        return self._sequences[axis]

    def _source(self, variable: str) -> Source:
        if variable not in self._sources:
            raise RefusedError(f"one of the {len(self._sources)} variables", variable, 404)
        return self._sources[variable]

    def _rows(self, axis: str, sequence: int, first: int, count: int) -> Ints:
        known = self._known(axis)
        _within("count", count, 1, self._limits.max_tokens)
        if not len(known):
            raise RefusedError("an axis with rows", axis, 404)
        _within("sequence", sequence, 0, len(known) - 1, 404)
        _within("first", first, 0, known.tokens(sequence) - 1, 404)
        return known.rows(sequence, first, count)

    def _part(self, variable: str, rows: Ints, layer: int, layers: int) -> Source:
        """Choose rows and layers of a variable; nothing of its values is read."""
        source = self._source(variable)
        depth = len(source.places)
        if not depth:
            raise RefusedError("a variable with layers", variable, 404)
        _within("layer", layer, 0, depth - 1, 404)
        last = min(layer + layers, depth)
        name = source.name
        names = [one for one in (name, f"{name}_present") if one in self._dataset]
        pick: dict[Any, Any] = {source.dim: _lightly(rows)}
        if source.layer_dims:
            pick["layer"] = slice(layer, last)
        with self._reading(variable):
            return source_of(self._dataset[names].isel(pick), name)

    def _column(self, part: Source, place: int) -> NDArray[np.float64]:
        """Read one feature of the rows of one layer."""
        rows = part.variable if part.places == (None,) else part.variable[0]
        if len(part.trailing) == 1:
            return np.asarray(rows[:, place].values, np.float64)
        held = int(self._limits.max_memory_gb * 1e9) // max(part.width * 16, 1)
        pieces = range(0, part.rows, max(held, 1))
        found = [flat(rows[one : one + max(held, 1)])[:, place] for one in pieces]
        return np.concatenate(found).astype(np.float64)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Let a file that is damaged or gone be an answer, and say to the owner which."""
        try:
            with np.errstate(all="ignore"):  # values are any, NaNs that signal among them
                yield
        except RefusedError:
            raise
        except FAULTS as error:
            self._tell(f"{what} can't be read: {error}"[:500])
            wanted = "values that can be read; actstore verify says where the file is damaged"
            raise RefusedError(wanted, what, 422) from error


def _within(name: str, value: int, least: int, most: int, status: int = 400) -> None:
    if not least <= value <= most:
        raise RefusedError(f"{name} from {least} to {most}", value, status)


def _place_of(feature: int, labels: NDArray[Any]) -> int:
    """Give the place of a feature, by its label where they are numbers."""
    if labels.dtype.kind in "iu" and labels.size:
        places = np.flatnonzero(labels == feature)
        if places.size:
            return int(places[0])
        wanted = f"one of {labels.size} features from {labels.min()} to {labels.max()}"
        raise RefusedError(wanted, feature, 404)
    _within("feature", feature, 0, labels.size - 1, 404)
    return feature


def _lightly(rows: Ints) -> slice | Ints:
    """Give rows that follow each other as a slice, which is read without being looked up."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == rows.size else rows
