"""Owns the page itself: what ``data`` says, as one HTML file that needs no network.

Everything that was in the data is escaped: as text in HTML, and as JSON that holds no ``<``. The
page's policy lets only its own script and style run, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, Final

import xarray as xr

from actstore.accessor import check_dataset
from actstore.buckets import local_target
from actstore.dataset import is_dataset
from actstore.errors import ConfigError
from actstore.files import atomic_write, writing
from actstore.markup import Page, amount, attribute, bytes_of, escape, facts, table
from actstore.reporting import data
from actstore.reporting.values import SAMPLE_VALUES, Limits, described

__all__ = ["Page", "explore", "report", "served_page"]

LIMIT_BYTES: Final = 5_000_000
_MAX_TOKENS: Final = 400


def report(
    source: str | os.PathLike[str] | xr.Dataset,
    target: str | os.PathLike[str],
    *,
    max_tokens: int = _MAX_TOKENS,
    sequence: tuple[int, int] | None = None,
    verify: bool = True,
    max_memory_gb: float = 1.0,
) -> Path:
    """Write the page of a run: one HTML file, of less than 5 MB, that needs no network.

    It says what the run is, whether it is intact, how large its parts are, how the capture went,
    and how to open it; and shows, layer by layer, how the values are distributed, and a sequence
    of tokens coloured by the norms of any layer or by the features that differ most in it. Of the
    values a bounded sample is read, about 1 GB at most, and the page says which.

    Parameters
    ----------
    source : path or xarray.Dataset
        A log, an archive's folder, ``.zarr.zip`` or ``.h5``; or a dataset, of which neither bytes
        nor checksums are known. Of a damaged log the values are left out.
    target : path
        The page; one that is there is replaced.
    max_tokens : int, optional
        The most tokens that are shown.
    sequence : (int, int), optional
        The pass and the batch item with which the tokens begin; they go on through the passes of
        a cached generation. The longest sequence, if it isn't given.
    verify : bool, optional
        Whether every checksum is looked at, which reads all of the file.
    max_memory_gb : float, optional
        What may be held of the values, in 10^9 bytes.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    MissingFileError
        There is nothing at ``source``.
    FormatError
        It is neither a log nor an archive.
    ConfigError
        There is no such sequence, an option is none, or ``target`` is a folder, a log or an
        archive.
    ArchiveError
        The page can't be written.
    """
    describe = partial(described, limits=Limits(max_tokens, sequence, max_memory_gb))
    path = _target(target)
    if isinstance(source, xr.Dataset):
        said = data.of_dataset(source, describe)
    else:
        said = data.of_path(source, describe, check=verify)
    with writing(path):
        atomic_write(path, _page(said).html.encode("utf-8", "backslashreplace"))
    return path


def explore(
    dataset: xr.Dataset,
    *,
    max_tokens: int = _MAX_TOKENS,
    sequence: tuple[int, int] | None = None,
    max_memory_gb: float = 1.0,
) -> Page:
    """Show the page of a dataset in a notebook; ``dataset.actstore.explore()`` is the same.

    Parameters
    ----------
    dataset : xarray.Dataset
        As `actstore.open_dataset` gave it, or chosen from that.
    max_tokens, sequence, max_memory_gb
        As for `actstore.report`.

    Returns
    -------
    Page
        Which a notebook shows inline; ``html`` is the page.

    Raises
    ------
    ConfigError
        It is no dataset, there is no such sequence, or an option is none.
    """
    check_dataset(dataset)
    describe = partial(described, limits=Limits(max_tokens, sequence, max_memory_gb))
    where = Path(str(dataset.encoding.get("source", "dataset"))).name
    return _page(data.of_dataset(dataset, describe, where))


def served_page(said: dict[str, Any]) -> tuple[str, str]:
    """Give the page of what a server says more of, when it is asked.

    Parameters
    ----------
    said : dict
        As of `data.of_path`, and ``served``: what the page has to know to ask.

    Returns
    -------
    html : str
    policy : str
        The content security policy that it is under.
    """
    return _page(said).html, _policy(said)


def _target(given: str | os.PathLike[str]) -> Path:
    path = local_target(given, "report")
    if path.is_dir() or is_dataset(path):
        msg = f"{path} is a folder, a log or an archive; give the page a name of its own"
        raise ConfigError(msg)
    if not path.absolute().parent.is_dir():
        msg = f"there is no folder {path.absolute().parent} for the page"
        raise ConfigError(msg)
    return path


# -- the page -------------------------------------------------------------------------------------


@cache
def _part(name: str) -> str:
    return resources("actstore.reporting").joinpath(name).read_text(encoding="utf-8")


def _page(said: dict[str, Any]) -> Page:
    """Write the page, with less of the values where it would be too large."""
    html = _html(said)
    while len(html.encode("utf-8", "backslashreplace")) >= LIMIT_BYTES and _shrink(said):
        html = _html(said)
    return Page(said["title"], html)


def _shrink(said: dict[str, Any]) -> bool:
    """Leave out what takes most: first features, then variables; say so. False: nothing left."""
    for key, words in (("features", "features"), ("norms", "norms")):
        held = [one for one in said["variables"] if one.get(key)]
        if held:
            one = held[-1]
            one[key] = []
            said["notes"].append(f"{one['name']}: its {words} are left out, to stay under 5 MB")
            return True
    for key in ("arrays", "variables"):
        if said[key]:
            del said[key][len(said[key]) // 2 :]
            return True
    for strip in said["strips"].values():
        if strip["count"]:
            strip |= {"count": 0, "labels": {}}
            return True
    return False


def _html(said: Mapping[str, Any]) -> str:
    style, script = _part("page.css"), _script(said)
    shown = ("variables", "strips", "probabilities", *(("served",) if "served" in said else ()))
    return _filled(
        _part("page.html"),
        {
            "TITLE": escape(said["title"]),
            "POLICY": _policy(said),
            "KIND": "serve" if "served" in said else "report",
            "STYLE": style,
            "SCRIPT": script,
            "LEAD": _lead(said),
            "HEALTH": _health(said["health"], said["advice"]),
            "IDENTITY": _identity(said),
            "ROWS": _rows(said),
            "SIZES": _sizes(said["sizes"], said["source"]),
            "ERRORS": _errors(said["sizes"]["layers"]),
            "METER": _meter(said["meter"]),
            "CODE": _code_text(_code(said)),
            "NOTES": _notes(said),
            "DATA": _json({name: said[name] for name in shown}),
        },
    )


def _script(said: Mapping[str, Any]) -> str:
    return (_part("fetched.js") if "served" in said else "") + _part("page.js")


def _policy(said: Mapping[str, Any]) -> str:
    """Let the page's own script and style run; a served one may ask its own server."""
    asks = "; connect-src 'self'" if "served" in said else ""
    return (
        f"default-src 'none'; script-src '{_hash(_script(said))}'; "
        f"style-src '{_hash(_part('page.css'))}'{asks}; base-uri 'none'; form-action 'none'"
    )


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Put parts in their places, and look for none in what was put."""
    found = []
    for piece in template.split("{{"):
        name, end, rest = piece.partition("}}")
        found.append(parts[name] + rest if end and name in parts else piece)
    return "".join(found)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(value: Any) -> str:
    """Give JSON that no HTML parser sees anything in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _code_text(text: str) -> str:
    """Escape text of any length."""
    return attribute(text).replace(">", "&gt;")


def _lead(said: Mapping[str, Any]) -> str:
    """Give the figures that come first."""
    sizes, source = said["sizes"], said["source"]
    rows = sum(one["rows"] for one in said["rows"])
    figures = [("rows", f"{rows:,}"), ("arrays", f"{len(said['arrays']):,}")]
    if sizes["sites"]:
        figures.append(("layers", f"{len(sizes['layers']) + sizes['more_layers']:,}"))
    if source["bytes"] is not None:
        figures.append(("on disk", bytes_of(source["bytes"])))
    if sizes["raw"]:
        figures.append(("times smaller", f"{sizes['ratio']:.2f}×"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(one)}</dd></div>" for name, one in figures
    )
    names = [str(one.get("name") or one.get("class") or "") for one in said["models"]]
    models = ", ".join(one for one in names[:3] if one)
    of = f" of {models}" if models else ""
    kind = source["kind"]
    words = f"{kind[0].upper()}{kind[1:]}{of}"
    return f'<p class="lead">{escape(words)}</p><dl class="figures">{cells}</dl>'


def _health(said: Mapping[str, Any], advice: str) -> str:
    marks = {"intact": "✓ Intact", "damaged": "✕ Damaged", "unfinished": "◐ Unfinished"}
    state = said["state"]
    mark = marks.get(state, "○ Not verified")
    parts = [f'<p class="state {state}"><strong>{mark}.</strong> {escape(said["words"])}</p>']
    if said.get("checked"):
        told = ", ".join(f"{count:,} {name}" for name, count in said["checked"].items())
        parts.append(f"<p>Looked at {bytes_of(said['bytes'])}: {escape(told)}.</p>")
    if said["damage"]:
        rows = [(one["where"], max(one["offset"], 0) if one["offset"] >= 0 else None,
                 one["reason"]) for one in said["damage"]]  # fmt: skip
        caption = "What is damaged"
        if said["damaged"] > len(rows):
            caption += f", the first {len(rows)} of {said['damaged']:,}"
        parts.append(_wide(table(caption, ("where", "byte", "why"), rows)))
    if advice:
        parts.append(f"<p>What is intact: <code>{escape(advice)}</code></p>")
    return "".join(parts)


def _identity(said: Mapping[str, Any]) -> str:
    tables = [facts(f"Model {number}", _named(one.items()))
              for number, one in enumerate(said["models"], start=1)]  # fmt: skip
    tables += [facts(f"Capture {number}", _named(one.items()))
               for number, one in enumerate(said["captures"], start=1)]  # fmt: skip
    if len(said["models"]) == 1:
        tables[0] = facts("Model", _named(said["models"][0].items()))
    if len(said["captures"]) == 1:
        tables[-1] = facts("Capture", _named(said["captures"][0].items()))
    if not tables:
        return "<p>The data doesn't say which model it is of.</p>"
    more = said["runs"] - len(said["captures"])
    tail = f"<p>And {more:,} further runs.</p>" if more > 0 else ""
    return f'<div class="columns">{"".join(map(_wide, tables))}</div>{tail}'


def _named(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name.replace("_", " "), one) for name, one in pairs if one not in (None, "")]


def _rows(said: Mapping[str, Any]) -> str:
    parts = []
    if said["rows"]:
        heads = ("axis", "rows", "padding", "passes", "batch items", "recorded tokens", "labels")
        keys = ("dim", "rows", "padding", "passes", "items", "steps", "labels")
        rows = [[one.get(key) for key in keys] for one in said["rows"]]
        parts.append(_wide(table("Rows, each a token of a batch item in a pass", heads, rows)))
    else:
        parts.append("<p>There are no rows: nothing in it has a token axis.</p>")
    if said["arrays"]:
        columns = ("array", "what it is", "dimensions", "model's dtype", "stored as", "precision")
        wanted = ("name", "what", "shape", "source", "dtype", "precision")
        lines = [[one[key] for key in wanted] for one in said["arrays"]]
        parts.append(_fold(f"{len(lines)} arrays", table("The arrays", columns, lines)))
    if said["aliases"]:
        pairs = said["aliases"].items()
        parts.append(_fold(f"{len(pairs)} sites that others hold", facts("Stored as", pairs)))
    return "".join(parts)


def _sizes(said: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    if not said["sites"]:
        return "<p>The data doesn't say how large its parts are.</p>"
    pairs = [
        ("captured", bytes_of(said["raw"] or 0)),
        ("stored", bytes_of(said["stored"] or 0)),
        ("ratio", f"{said['ratio']:.2f}×"),
        ("the log's file", None if said["log"] is None else bytes_of(said["log"])),
        ("on disk", None if source["bytes"] is None else bytes_of(source["bytes"])),
        ("packets", said["packets"]),
        ("passes", said["passes"]),
        ("recorded tokens", said["tokens"]),
        ("compression", said["compression"]),
        ("dtypes", said["dtypes"]),
    ]
    most = max((one["stored"] for one in said["sites"]), default=0) or 1
    body = "".join(
        f'<tr><th scope="row" class="s">{escape(one["site"])}'
        f"<small>{escape(one['what'])}</small></th>"
        f'<td class="n">{one["layers"]:,}</td><td class="n">{_captured(one)}</td>'
        f'<td class="n">{_stored(one)}{_bar(one["stored"] / most)}</td>'
        f'<td class="n">{_ratio(one)}</td></tr>'
        for one in said["sites"]
    )
    heads = "".join(f'<th scope="col">{one}</th>'
                    for one in ("site", "layers", "captured", "stored", "ratio"))  # fmt: skip
    sites = (
        f"<table><caption>By site, the largest first</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
    rows = [
        (one["layer"], one["site"], one["packets"], _captured(one),
         _stored(one), _ratio(one))
        for one in said["layers"]
    ]  # fmt: skip
    heads_each = ("layer", "site", "packets", "captured", "stored", "ratio")
    caption = "By layer" + (
        f", the first {len(rows)} of {len(rows) + said['more_layers']:,}"
        if said["more_layers"]
        else ""
    )
    return (
        _wide(facts("In all", [one for one in pairs if one[1] is not None]))
        + _wide(sites)
        + _fold(f"Each of {len(rows)} layers", table(caption, heads_each, rows))
    )


def _captured(one: Mapping[str, Any]) -> str:
    if one["aliases"] and not one["raw"]:
        return "under another name"
    return bytes_of(one["raw"])


def _stored(one: Mapping[str, Any]) -> str:
    if not one["stored"] and (one["raw"] or one["aliases"]):
        return "under another name"
    return bytes_of(one["stored"])


def _ratio(one: Mapping[str, Any]) -> str:
    if one["raw"] and one["stored"]:
        return f"{one['raw'] / one['stored']:.2f}×"
    return "–"


def _bar(share: float) -> str:
    width = max(min(share * 100, 100), 0)
    return (
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width:.1f}" height="4"/></svg>'
    )


def _errors(layers: Sequence[Mapping[str, Any]]) -> str:
    lossy = [one for one in layers if one["errors"]]
    if not lossy:
        return ""
    worst = sorted(lossy, key=lambda one: -(one["errors"]["nmse"] or 0))
    heads = ("layer", "precision", "NMSE", "mean error", "largest error", "kept whole")
    rows = [
        (
            one["layer"],
            one["errors"]["precision"],
            one["errors"]["nmse"],
            one["errors"]["mean_error"],
            one["errors"]["largest_error"],
            None if one["errors"]["whole"] is None else f"{one['errors']['whole']:.1%}",
        )
        for one in worst
    ]
    some = "" if len(rows) <= 5 else _fold(f"All {len(rows)} lossy layers",
                                           table("By NMSE", heads, rows))  # fmt: skip
    caption = "The layers with the largest errors" if some else "By NMSE"
    return (
        '<section aria-labelledby="h-errors"><h2 id="h-errors">What precision was given up</h2>'
        "<p>NMSE is the squared error over the values' squares.</p>"
        f"{_wide(table(caption, heads, rows[:5]))}{some}</section>"
    )


def _meter(said: Mapping[str, Any]) -> str:
    if not said:
        return "<p>The log doesn't say how the capture went: it was not closed, or is several.</p>"
    rate, wanted = said.get("sustained_gbps"), said.get("target_throughput_gbps")
    parts = []
    if rate is not None and wanted is not None:
        met = "met" if said.get("target_met") else "not met"
        limit = f"; limited by {said['limited_by']}" if said.get("limited_by") else ""
        words = f"{rate:.3g} GB/s of {wanted:.3g} wanted: {met}{limit}."
        parts.append(f"<p>{escape(words)}</p>")
    expected, written = said.get("packets_expected"), said.get("packets_written")
    lost = None if expected is None or written is None else expected - written
    pairs = [
        ("seconds", said.get("duration_seconds")),
        ("best second, GB/s", said.get("peak_gbps")),
        ("packets expected", expected),
        ("packets written", written),
        ("packets lost", lost),
        ("the model waited, s", said.get("waited_seconds")),
        *((f"… {cause}, s", one) for cause, one in said["waits_for"].items() if one),
        ("the writer wrote, s", said.get("writing_seconds")),
        ("share of the time in hooks", _percent(said.get("share_in_hooks"))),
        ("most staged", _bytes_or_none(said.get("staging_high_water_bytes"))),
        ("layers that never fired", said["never_fired"] or None),
        ("skipped", said["skipped"] or None),
        ("experts fused in one tensor", said["fused_experts"] or None),
        ("ended by", said["ended_by"]),
    ]
    return "".join(parts) + _wide(facts("The meter", _named(pairs)))


def _percent(value: Any) -> str | None:
    return None if value is None else f"{value:.1%}"


def _bytes_or_none(value: Any) -> str | None:
    return None if value is None else bytes_of(value)


def _code(said: Mapping[str, Any]) -> str:
    name = said["source"]["name"]
    if not name.isprintable():
        name = ascii(name)[1:-1]
    quoted = json.dumps(name, ensure_ascii=False)
    lines = ["import actstore", "", f"ds = actstore.open_dataset({quoted})  # lazy"]
    variable = next((one["name"] for one in said["variables"]), None)
    if variable is not None:
        lines += [f"values = ds[{json.dumps(variable, ensure_ascii=False)}]"]
    lines += ["rows = ds.actstore  # chooses rows by token, step and label"] * bool(said["rows"])
    kind = said["source"]["kind"]
    plain = {
        "archive (Zarr v3)": f"xr.open_zarr({quoted})",
        "archive (zip of Zarr v3)": f'xr.open_zarr(zarr.storage.ZipStore({quoted}, mode="r"))',
        "archive (HDF5)": f'xr.open_dataset({quoted}, engine="h5netcdf")',
    }.get(kind)
    if plain:
        module = "import xarray as xr" + (", zarr" if "zarr." in plain else "")
        lines += ["", "# or without actstore", module, f"plain = {plain}"]
    elif kind == "log":
        archive = json.dumps(f"{Path(name).stem}.zarr", ensure_ascii=False)
        lines += ["", "# or as an archive", f"actstore.compact({quoted}, {archive})"]
    return "\n".join(lines)


def _notes(said: Mapping[str, Any]) -> str:
    notes = [
        f"Written by actstore {said['writer']} on {said['created'].replace('+00:00', ' UTC')}.",
        *_samples(said["variables"]),
        *said["notes"],
    ]
    items = "".join(f"<li>{escape(one)}</li>" for one in notes)
    return f"<ul>{items}</ul>"


def _samples(variables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what of the values was looked at, the same words once."""
    told: dict[str, list[str]] = {}
    for one in variables:
        sample = one.get("sample")
        if sample:
            rows, of = sample["rows"], sample["of"]
            words = "all" if rows + sample.get("padding", 0) >= of else f"{rows:,} of"
            told.setdefault(f"{words} {of:,} rows", []).append(one["name"])
    found = [
        f"The distributions of {', '.join(names[:5])}{', …' * (len(names) > 5)} are of {words}"
        + (", runs spread evenly." if " of " in words else ", but for padding.")
        for words, names in told.items()
    ]
    if found:
        found.append(
            "The features in the strip are those of each layer whose values differ most in it, by "
            "their standard deviation. Quantiles and zeros of a layer with more than "
            f"{SAMPLE_VALUES:,} values in the sample are of at least as many of them, of each "
            "feature alike."
        )
    return found


def _wide(html: str) -> str:
    """Let a wide table be scrolled, by the keyboard too."""
    caption = html.partition("<caption>")[2].partition("</caption>")[0]
    return f'<div class="wide" role="region" tabindex="0" aria-label="{caption}">{html}</div>'


def _fold(words: str, html: str) -> str:
    return f"<details><summary>{escape(amount(words))}</summary>{_wide(html)}</details>"
