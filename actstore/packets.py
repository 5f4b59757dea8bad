"""Owns the packets of a log as a table: where each stands, its bytes, what its values are like.

The statistics of many rows are ``analysis``'s; this reads a packet at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from actstore.buckets import place_of
from actstore.dtypes import from_code
from actstore.stream import summary
from actstore.stream.reader import StreamReader, open_stream

__all__ = ["packet_table"]

_OF_TOKENS = ("step", "token_index", "token_id", "token_text")
_OF_VALUES = ("l2_norm", "mean", "std", "max", "min", "sparsity")


def packet_table(
    path: str | os.PathLike[str],
    *,
    values: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Give the packets of a log as a table, in the order of capture.

    Parameters
    ----------
    path : path
        A ``.stream`` log, also of ``llm-instrumentation``; or the URL of one in a bucket.
    values : bool
        Read them, and say what they are like.
    shapes, dtypes : mapping, optional
        Of a log of ``llm-instrumentation``, which holds none: as for `open_stream`.
    storage_options : mapping, optional
        Of a bucket, as for `open_stream`.

    Returns
    -------
    pandas.DataFrame
        A row for each packet: ``packet_index``, ``layer_name``, ``pass_index``, ``call``,
        ``dtype``, ``shape``, ``uncompressed_bytes`` and ``compressed_bytes`` (0 where it is an
        alias), ``compression_ratio``; ``step``, ``token_index``, ``token_id`` and ``token_text``
        of the recorded token that its pass led to (missing where there is none); and of its
        values, in float64, ``l2_norm``, ``mean``, ``std``, ``max``, ``min``, and ``sparsity``,
        the share of zeros. NaN where they are complex or none.

    Raises
    ------
    ConfigError, MissingFileError, FormatError, StreamCorruptError, BucketError
        As for `open_stream`.
    """
    place = place_of(path, "packet_table", storage_options)
    with open_stream(place, shapes=shapes, dtypes=dtypes) as reader:
        reader.check()
        table = _places(reader)
        if values:
            found = [_describe(one.values) for one in reader.packets()]
            columns = np.array(found, np.float64).reshape(len(found), len(_OF_VALUES))
            table[list(_OF_VALUES)] = columns
        return table


def _places(reader: StreamReader) -> pd.DataFrame:
    rows = reader.table
    first = np.flatnonzero(rows.whole())
    encoded, raw = (
        np.add.reduceat(column, first) if first.size else column
        for column in (rows.encoded.astype(np.int64), rows.nbytes.astype(np.int64))
    )
    names = {info.id: name for name, info in reader.layers.items()}
    kinds = [from_code(one).name for one in rows.dtype[first].tolist()]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(encoded > 0, raw / encoded, np.nan)
    table = pd.DataFrame(
        {
            "packet_index": np.arange(first.size),
            "layer_name": [names[one] for one in rows.layer[first].tolist()],
            "pass_index": rows.pass_index[first],
            "call": rows.call[first],
            "dtype": kinds,
            "shape": [rows.shapes[one] for one in rows.shape[first].tolist()],
            "uncompressed_bytes": raw,
            "compressed_bytes": encoded,
            "compression_ratio": ratio,
        }
    )
    tokens = pd.DataFrame(
        [
            {"pass_index": index, **{name: one[name] for name in _OF_TOKENS}}
            for one in summary.summarise_tokens(reader)
            for index in one["passes"]
        ],
        columns=["pass_index", *_OF_TOKENS],
    )
    integers = {"pass_index": "int64"} | dict.fromkeys(_OF_TOKENS[:3], "Int64")
    return table.merge(tokens.astype(integers), "left", "pass_index")


def _describe(values: NDArray[Any]) -> tuple[float, ...]:
    if not values.size or values.dtype.kind == "c":
        return (np.nan,) * len(_OF_VALUES)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = values.astype(np.float64).ravel()
        return (
            float(np.linalg.norm(wide)),
            float(wide.mean()),
            float(wide.std()),
            float(wide.max()),
            float(wide.min()),
            float((wide == 0).mean()),
        )
