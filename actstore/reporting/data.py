"""Owns what a page says, as plain JSON: of a log, an archive, or a dataset alone.

What it shows of the values is ``values``'s; how it looks is ``page``'s.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import xarray as xr

import actstore
from actstore import hdf5
from actstore.accessor import token_axes
from actstore.archive import zipped
from actstore.buckets import local
from actstore.dataset import open_dataset
from actstore.errors import ActstoreWarning, StreamCorruptError
from actstore.reporting.values import QUANTILES, finite
from actstore.sharing.card import hook_point, model_identity
from actstore.stream import summary
from actstore.stream.reader import open_stream
from actstore.verification import verify

__all__ = ["Describe", "of_dataset", "of_path"]

_DAMAGES: Final = 50
_LINES: Final = 400  # of a table
_TEXT: Final = 200
_CAUSES: Final = {
    "budget": "for the memory budget",
    "encoding": "for encoding",
    "disk": "for the disk",
    "device": "for the device",
}


#: Says what is shown of the values: ``variables``, ``strips`` and ``notes``, as JSON has them.
Describe = Callable[[xr.Dataset], dict[str, Any]]


def of_path(source: str | os.PathLike[str], describe: Describe, *, check: bool) -> dict[str, Any]:
    """Say what is on the page of a log or an archive.

    Parameters
    ----------
    source : path
        A log, an archive's folder, ``.zarr.zip`` or ``.h5``; no URL.
    describe : function
        Says what is shown of the values.
    check : bool
        Whether every checksum is looked at.

    Returns
    -------
    dict
        Of str, int, float, bool, None, lists and dicts: JSON without NaN.

    Raises
    ------
    MissingFileError, FormatError, StreamCorruptError
        There is nothing, it is neither, or so damaged that nothing can be said of it.
    ConfigError
        There is no such sequence.
    """
    place = local(source, "report")
    health = _health(place) if check else _unchecked()
    name = place.absolute().name
    try:
        dataset = open_dataset(place, chunks=None)
    except StreamCorruptError as error:
        if place.is_dir():
            raise
        said = _said(xr.Dataset(), name, describe)
        said["notes"] = [f"The log is damaged, so that its values are not shown: {error}"[:500]]
    else:
        with dataset:
            said = _said(dataset, name, describe)
    if not (place.is_dir() or zipped.is_zip(place) or hdf5.is_hdf5(place)):
        with open_stream(place, errors="skip") as reader:
            analysis = summary.summarise(reader)
            header: Mapping[str, Any] = reader.header
            said |= _of_analysis(analysis) | _of_runs([header])
            if health["state"] == "damaged" or reader.damage:
                said["advice"] = f'actstore.recover("{name}")'
            if health["state"] == "unchecked" and not reader.complete:
                health |= {"state": "unfinished", "words": _UNFINISHED}
    said["health"] = health
    said["source"] |= {"kind": _kind(place), "bytes": _size(place)}
    return said


def of_dataset(dataset: xr.Dataset, describe: Describe, name: str = "dataset") -> dict[str, Any]:
    """Say what is on the page of a dataset, from itself alone; as `of_path`."""
    said = _said(dataset, name, describe)
    return said | {"health": _unchecked()}


def _said(dataset: xr.Dataset, name: str, describe: Describe) -> dict[str, Any]:
    attributes = dataset.attrs
    analysis = attributes.get("analysis")
    said: dict[str, Any] = {
        "format": "actstore-report",
        "title": _cut(name),
        "writer": actstore.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"name": name, "kind": "dataset", "bytes": None},
        "probabilities": list(QUANTILES),
        "rows": [_axis(dataset, dim) for dim in token_axes(dataset)],
        "arrays": [_array(dataset, str(one)) for one in [*dataset.data_vars][:_LINES]],
        "aliases": _texts(attributes.get("aliases")),
        "advice": "",
    }
    said |= _of_analysis(analysis if isinstance(analysis, Mapping) else {})
    runs = attributes.get("runs")
    said |= _of_runs(runs if isinstance(runs, list | tuple) else [])
    said |= describe(dataset)
    if len(dataset.data_vars) > _LINES:
        said["notes"].append(f"{len(dataset.data_vars)} arrays: the first {_LINES} are listed")
    return said


# -- how it is ------------------------------------------------------------------------------------

_UNFINISHED: Final = (
    "The log was not closed: its writer was killed, or is still at work. What it committed is "
    "intact."
)


def _unchecked() -> dict[str, Any]:
    return {"state": "unchecked", "words": "Checksums were not looked at.", "damage": []}


def _health(place: Path) -> dict[str, Any]:
    """Check every checksum, and say what was found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActstoreWarning)
        found = verify(place)
    damage = [
        {"where": _cut(one.where), "offset": one.offset, "reason": _cut(one.reason)}
        for one in found.damage[:_DAMAGES]
    ]
    count = len(found.damage)
    if count:
        state, words = "damaged", f"{count} damaged place{'s' * (count > 1)}."
    elif not found.complete:
        state, words = "unfinished", _UNFINISHED
    elif found.kind == "legacy log":
        state = "intact"
        words = "Its packets decode; a log of llm-instrumentation has no checksums."
    else:
        state, words = "intact", "Every checksum is right."
    checked = {str(name): int(one) for name, one in found.checked.items()}
    about = {"checked": checked, "bytes": found.bytes, "damaged": count}
    return {"state": state, "words": words, "damage": damage, **about}


def _kind(place: Path) -> str:
    if place.is_dir():
        return "archive (Zarr v3)"
    if zipped.is_zip(place):
        return "archive (zip of Zarr v3)"
    return "archive (HDF5)" if hdf5.is_hdf5(place) else "log"


def _size(place: Path) -> int:
    if place.is_dir():
        return sum(one.stat().st_size for one in place.rglob("*") if one.is_file())
    return place.stat().st_size


# -- what it is -----------------------------------------------------------------------------------


def _of_runs(runs: Sequence[Any]) -> dict[str, Any]:
    """Say which models ran, and how they were captured."""
    models: list[dict[str, Any]] = []
    captures = []
    for run in runs[:32]:
        if not isinstance(run, Mapping):
            continue
        try:
            identities = model_identity(run)
        except (TypeError, AttributeError, ValueError):  # a header of another tool
            identities = []
        for one in identities:  # where on a disk it was is nobody's business
            if isinstance(one["name"], str):
                one["name"] = (
                    one["name"].rstrip("/").rpartition("/")[2]
                    if _is_place(one["name"])
                    else one["name"]
                )
        models += [one for one in identities if one not in models]
        capture, writer = _mapping(run.get("capture")), _mapping(run.get("writer"))
        told = {"run": run.get("run_id"), "begun": run.get("created"), "rank": run.get("rank")}
        told |= {"writer": f"{writer.get('name', '?')} {writer.get('version', '')}"}
        captures.append(_texts(told | dict(capture)))
    return {
        "models": [_texts(one) for one in models],
        "captures": captures,
        "runs": len(runs),
    }


def _is_place(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name[1:2] == ":"


def _of_analysis(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """Say how large it is, by site and by layer; what was lost; and how the capture went."""
    per_layer = _mapping(analysis.get("per_layer"))
    layers, sites = [], dict[str, dict[str, Any]]()
    for name, one in per_layer.items():
        site = str(one.get("site", name))
        said = {
            "layer": _cut(name or "(the model)"),
            "site": _cut(site),
            "packets": int(one.get("count", 0)),
            "raw": int(one.get("raw_bytes", 0)),
            "stored": int(one.get("bytes", 0)),
            "aliases": int(one.get("aliases", 0)),
            "errors": _errors(_mapping(one.get("errors"))),
        }
        layers.append(said)
        sums = sites.setdefault(
            site,
            {"site": _cut(site), "what": _cut(hook_point(site)), "layers": 0, "dtypes": []},
        )
        sums["layers"] += 1
        kinds = [str(kind) for kind in one.get("dtypes", [])]
        sums["dtypes"] = [*dict.fromkeys([*sums["dtypes"], *kinds])]
        for key in ("packets", "raw", "stored", "aliases"):
            sums[key] = sums.get(key, 0) + said[key]
    return {
        "sizes": {
            "packets": analysis.get("packets"),
            "passes": analysis.get("passes"),
            "tokens": analysis.get("tokens"),
            "raw": analysis.get("total_raw_bytes"),
            "stored": analysis.get("total_compressed_bytes"),
            "ratio": finite(analysis.get("compression_ratio") or 0.0),
            "log": analysis.get("file_bytes"),
            "compression": analysis.get("compression"),
            "dtypes": [str(one) for one in analysis.get("dtypes", [])],
            "sites": sorted(sites.values(), key=lambda one: -one["stored"])[:_LINES],
            "layers": layers[:_LINES],
            "more_layers": max(len(layers) - _LINES, 0),
        },
        "meter": _meter(_mapping(analysis.get("summary"))),
    }


def _errors(said: Mapping[str, Any]) -> dict[str, Any] | None:
    if not said:
        return None
    found: dict[str, Any] = {"precision": _cut(said.get("precision"))}
    for name in ("nmse", "mse", "mean_error", "largest_error"):
        value = said.get(name)
        found[name] = finite(value) if isinstance(value, int | float) else None
    elements = said.get("elements") or 0
    kept = said.get("lossless_elements") or 0
    return found | {"whole": finite(kept / elements) if elements else None}


def _meter(said: Mapping[str, Any]) -> dict[str, Any]:
    """Say how the capture went; empty where its log doesn't."""
    if not said:
        return {}
    numbers = (
        *("packets", "packets_expected", "packets_written", "passes", "tokens", "raw_bytes"),
        *("encoded_bytes", "duration_seconds", "sustained_gbps", "peak_gbps"),
        *("target_throughput_gbps", "waited_seconds", "writing_seconds", "share_in_hooks"),
        *("staging_high_water_bytes", "ignored_recomputed", "waits"),
    )
    found = {name: _number(said[name]) for name in numbers if name in said}
    waits = {
        _CAUSES.get(str(cause), str(cause)): _number(one)
        for cause, one in _mapping(said.get("waited_by_cause")).items()
    }
    lists = {
        name: [_cut(one) for one in list(said.get(name) or [])[:_DAMAGES]]
        for name in ("never_fired", "fused_experts", "skipped")
    }
    told = {"target_met": said.get("target_met"), "limited_by": _cut(said.get("limited_by"))}
    return {**found, **told, "ended_by": _cut(said.get("ended_by")), "waits_for": waits, **lists}


def _axis(dataset: xr.Dataset, dim: str) -> dict[str, Any]:
    """Say what rows an axis has, from its labels."""
    axis = token_axes(dataset)[dim]
    found: dict[str, Any] = {"dim": dim, "rows": axis.rows, "labels": [*axis.names][:64]}
    if axis.rows:
        for name, key in (("pass_index", "passes"), ("batch_item", "items")):
            if name in axis:
                found[key] = int(axis.label(name).nunique())
        if "is_padding" in axis:
            found["padding"] = int(axis.label("is_padding").to_numpy().astype(bool).sum())
        if "step" in axis:
            found["steps"] = int((axis.label("step") >= 0).sum())
    return found


def _array(dataset: xr.Dataset, name: str) -> dict[str, Any]:
    array = dataset[name]
    said = array.attrs
    return {
        "name": _cut(name),
        "what": _cut(hook_point(str(said["site"]))) if "site" in said else "",
        "shape": " × ".join(f"{dim} {size:,}" for dim, size in array.sizes.items()),
        "dtype": str(array.dtype),
        "source": _cut(said.get("source_dtype")),
        "precision": _cut(said.get("precision")) or "exact",
    }


# -- as JSON --------------------------------------------------------------------------------------


def _mapping(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return finite(value) if isinstance(value, float) else value


def _cut(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"


def _texts(given: Any) -> dict[str, Any]:
    """Give a mapping with short texts and numbers."""
    found: dict[str, Any] = {}
    for name, one in [*_mapping(given).items()][:64]:
        if isinstance(one, bool | int) or one is None:
            found[_cut(name)] = one
        elif isinstance(one, float):
            found[_cut(name)] = finite(one)
        elif isinstance(one, Mapping):
            found[_cut(name)] = _cut(", ".join(f"{key} {value}" for key, value in one.items()))
        elif isinstance(one, list | tuple):
            found[_cut(name)] = _cut(", ".join(map(str, one)))
        else:
            found[_cut(name)] = _cut(one)
    return found
