"""Owns what a log amounts to: counts and bytes by layer and by generated token, from its tables.

No payload is read. Statistics of the values are ``actstore.analysis``'s.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.packet import LayerInfo
from actstore.stream.reader import StreamReader

__all__ = ["merge", "summarise", "summarise_tokens"]

_SHAPES = 16
_NOTHING = dict.fromkeys(("count", "bytes", "raw_bytes", "aliases"), 0)
_SUMS = (
    *("packets", "total_compressed_bytes", "total_raw_bytes", "file_bytes", "passes", "tokens"),
)


def summarise(reader: StreamReader) -> dict[str, Any]:
    """Count packets and bytes of a log, in all and by layer.

    Parameters
    ----------
    reader : StreamReader
        The log.

    Returns
    -------
    dict
        ``stream_path``, ``compression``, ``packets``, ``total_compressed_bytes`` (encoded
        payload, without framing), ``per_layer`` {name: {``count``, ``bytes``, ``raw_bytes``,
        ``aliases``, ``dtypes``, ``shapes``, ``site``, ``block``}}, ``total_raw_bytes``,
        ``compression_ratio``, ``file_bytes``, ``dtypes``, ``passes``, ``tokens``,
        ``duration_seconds``, ``sustained_gbps``, ``waited_seconds`` (None where the log was not
        closed), ``complete``, and ``summary``, the run's own.
    """
    rows = reader.table
    whole = rows.whole()
    capture = reader.header.get("capture")
    encoded, raw = int(rows.encoded.sum()), int(rows.nbytes.sum())
    per_layer = {name: _layer(reader, info) for name, info in reader.layers.items()}
    return {
        "stream_path": str(reader.path),
        "compression": capture.get("compression") if isinstance(capture, dict) else None,
        "packets": int(whole.sum()),
        "total_compressed_bytes": encoded,
        "per_layer": {name: found for name, found in per_layer.items() if found["count"]},
        "total_raw_bytes": raw,
        "compression_ratio": raw / encoded if encoded else 1.0,
        "file_bytes": reader.file_bytes,
        "dtypes": _dtypes(rows.dtype[whole]),
        "passes": len(reader.passes),
        "tokens": len(reader.tokens),
        "duration_seconds": reader.summary.get("duration_seconds"),
        "sustained_gbps": reader.summary.get("sustained_gbps"),
        "waited_seconds": reader.summary.get("waited_seconds"),
        "complete": reader.complete,
        "summary": dict(reader.summary),
    }


def merge(given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put together what `summarise` says of several logs, at least one.

    Returns
    -------
    dict
        As `summarise` has it: sums; ``stream_path`` and ``compression`` of the first log,
        ``summary`` of one alone, and no rates of several.
    """
    found = copy.deepcopy(dict(given[0]))
    for one in given[1:]:
        found |= {name: found[name] + one[name] for name in _SUMS}
        for name, layer in one["per_layer"].items():
            known = found["per_layer"].setdefault(name, {**layer, **_NOTHING})
            known |= {count: known[count] + layer[count] for count in _NOTHING}
            known["dtypes"] = sorted({*known["dtypes"], *layer["dtypes"]})
            shapes = known["shapes"]
            known["shapes"] = [*shapes, *(one for one in layer["shapes"] if one not in shapes)]
            del known["shapes"][_SHAPES:]
        found["dtypes"] = sorted({*found["dtypes"], *one["dtypes"]})
        found["complete"] &= one["complete"]
    if len(given) > 1:
        encoded = found["total_compressed_bytes"]
        found["compression_ratio"] = found["total_raw_bytes"] / encoded if encoded else 1.0
        found |= {"summary": {}, "duration_seconds": None}
        found |= {"sustained_gbps": None, "waited_seconds": None}
    return found


def summarise_tokens(reader: StreamReader) -> list[dict[str, Any]]:
    """Count packets and bytes of each generated token, from true boundaries.

    A token has the passes since the one before it.

    Parameters
    ----------
    reader : StreamReader
        The log.

    Returns
    -------
    list of dict
        For each step: ``step``, ``token_index``, ``token_id``, ``token_text``, ``passes`` (their
        indices), ``packets``, ``bytes`` (encoded) and ``raw_bytes``.
    """
    rows = reader.table
    order = np.argsort(rows.pass_index, kind="stable")
    index = rows.pass_index[order]
    packets, encoded, raw = (
        np.concatenate(([0], np.cumsum(column[order], dtype=np.int64)))
        for column in (rows.whole(), rows.encoded, rows.nbytes)
    )
    known = np.array([one.index for one in reader.passes], np.int64)
    found, before = [], -1
    for record in reader.tokens:
        bounds = np.array([before, max(before, record.pass_index)], np.int64)
        low, high = np.searchsorted(index, bounds, side="right").tolist()
        first, last = np.searchsorted(known, bounds, side="right").tolist()
        found.append(
            {
                "step": record.step,
                "token_index": record.step if record.position is None else record.position,
                "token_id": record.token_id,
                "token_text": record.token_text,
                "passes": known[first:last].tolist(),
                "packets": int(packets[high] - packets[low]),
                "bytes": int(encoded[high] - encoded[low]),
                "raw_bytes": int(raw[high] - raw[low]),
            }
        )
        before = max(before, record.pass_index)
    return found


def _layer(reader: StreamReader, info: LayerInfo) -> dict[str, Any]:
    rows = reader.table
    mine = rows.layer == info.id
    whole = mine & rows.whole()
    shapes = [list(rows.shapes[index]) for index in np.unique(rows.shape[whole])[:_SHAPES]]
    return {
        "count": int(whole.sum()),
        "bytes": int(rows.encoded[mine].sum()),
        "raw_bytes": int(rows.nbytes[mine].sum()),
        "aliases": int((rows.alias_of[whole] >= 0).sum()),
        "dtypes": _dtypes(rows.dtype[whole]),
        "shapes": shapes,
        "site": info.site,
        "block": info.block,
    }


def _dtypes(codes: NDArray[np.int64]) -> list[str]:
    return [dtypes.from_code(int(code)).name for code in np.unique(codes)]
