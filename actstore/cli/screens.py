"""Owns what each command's result looks like; what is told is given, nothing is read here.

How a number or a table is drawn is ``drawing``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from actstore.cli.drawing import (
    count,
    duration,
    facts,
    lines,
    many,
    number,
    rate,
    ratio,
    rounded,
    size,
    table,
)
from actstore.parallel import AXES

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from actstore.overview import LayerLine, Overview

__all__ = [
    "captured",
    "compacted",
    "exchanged",
    "layers_screen",
    "leaving",
    "measured",
    "overview_screen",
    "recovered",
    "served",
    "shared",
    "statistics",
    "tokens_screen",
    "verified",
]


def overview_screen(one: Overview) -> Table:
    """Show what a file is."""
    first = one.runs[0] if one.runs else {}
    return facts(
        [
            ("path", one.path),
            ("what", f"{_kind(one)}, {_state(one)}"),
            *(("model", _model(said)) for said in first.get("models", ())),
            *(("run", _run(run)) for run in one.runs[:3]),
            *(("from", _origin(run)) for run in one.runs[:3]),
            ("", f"and {len(one.runs) - 3} more runs" if len(one.runs) > 3 else ""),
            ("captured", _captured(one, first.get("capture") or {})),
            ("rows", ", ".join(f"{count(rows)} on {dim}" for dim, rows in one.rows.items())),
            ("dtypes", ", ".join(one.dtypes)),
            ("bytes", f"{size(one.raw_bytes)} of values in {size(one.stored_bytes)}, "
                      f"{ratio(one.ratio)} smaller, by {one.compression!r}; "
                      f"{size(one.file_bytes)} in all"),
            ("precision", _precision(one)),
            ("errors", _errors(one)),
            ("speed", _speed(one.summary)),
            ("damage", f"{many(len(one.damage), 'place')}, first at {one.damage[0]}"
                       if one.damage else ""),
            ("provenance", _provenance(one.provenance)),
        ]
    )  # fmt: skip


def _state(one: Overview) -> str:
    if one.writing:
        return "being written"
    return "complete" if one.complete else "not closed cleanly"


def _kind(one: Overview) -> str:
    return {
        "log": "a log of actstore",
        "legacy log": "a log of llm-instrumentation",
        "archive": "a Zarr archive",
        "zip": "a zipped Zarr archive",
        "HDF5": "an HDF5 archive",
    }[one.kind]


def _model(said: Mapping[str, Any]) -> str:
    config = said.get("config") or {}
    name = config.get("_name_or_path")
    parts = [str(said.get("class", "")), f"{count(said['parameters'])} parameters"
             if "parameters" in said else "", ", ".join(said.get("dtypes", {}))]  # fmt: skip
    parts += [f"from {name}"] if name else []
    return ", ".join(filter(None, parts))


def _run(run: Mapping[str, Any]) -> str:
    parts = [str(run.get("run_id") or ""), str(run.get("created") or "")[:19].replace("T", " ")]
    if run.get("world_size", 1) > 1:
        parts.append(f"rank {run['rank']} of {run['world_size']}")
    said = run.get("parallel")
    places = [(axis, said.get(axis)) for axis in AXES] if isinstance(said, dict) else []
    parts += [f"{axis} {place[0]} of {place[1]}" for axis, place in places
              if isinstance(place, list) and len(place) == 2 and place != [0, 1]]  # fmt: skip
    return ", ".join(filter(None, parts))


def _origin(run: Mapping[str, Any]) -> str:
    """Say what a log was made of that no capture wrote."""
    if "recovered_from" in run:
        return f"recovered from {run['recovered_from'].get('name')}"
    said = run.get("imported") or {}
    names = _some([str(one.get("name")) for one in said.get("files", ())])
    return f"imported from {names}, as {said.get('kind')}" if said else ""


def _captured(one: Overview, capture: Mapping[str, Any]) -> str:
    parts = [
        str(capture.get("granularity") or ""),
        many(len(one.per_layer), "layer"),
        f"{many(one.packets, 'packet')} in {many(one.passes, 'pass', 'passes')}",
        many(one.tokens, "recorded token") if one.tokens else "",
        f"rows {capture['rows']!r} only" if capture.get("rows") else "",
    ]
    return ", ".join(filter(None, parts))


def _precision(one: Overview) -> str:
    if one.kind in ("log", "legacy log"):
        return ""
    if not one.precision:
        return "all of it: lossless"
    kept: dict[str, list[str]] = {}
    for name, said in one.precision.items():
        kept.setdefault(said, []).append(name)
    return "; ".join(f"{said}: {_some(names)}" for said, names in kept.items())


def _errors(one: Overview) -> str:
    errors = [said["errors"] for said in one.per_layer.values() if "errors" in said]
    if not errors:
        return ""
    worst = max(one.get("nmse") or 0.0 for one in errors)
    largest = max(one.get("largest") or one.get("max") or 0.0 for one in errors)
    said = f"NMSE at most {worst:.1e} in a layer"
    return f"{said}, largest error {largest:.3g}" if largest else said


def _speed(said: Mapping[str, Any]) -> str:
    if not said.get("duration_seconds") or "sustained_gbps" not in said:
        return ""
    parts = [
        duration(said["duration_seconds"]),
        rate(said["sustained_gbps"] * 1e9, "bytes"),
        f"waited {duration(said.get('waited_seconds') or 0.0)}",
        f"ended by {said['ended_by']}" if said.get("ended_by") else "",
    ]
    return ", ".join(filter(None, parts))


def _provenance(said: Mapping[str, Any]) -> str:
    if not said:
        return ""
    writer, logs = said.get("writer", {}), said.get("logs", ())
    names = _some([str(one.get("name")) for one in logs])
    created = str(said.get("created", ""))[:19].replace("T", " ")
    return f"{writer.get('name')} {writer.get('version')}, {created}, of {names}"


def _some(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {count(len(names) - most)} more" if len(names) > most else shown


def layers_screen(console: Console, found: Sequence[LayerLine], *, sites: bool) -> Group:
    """Show layers, or sites."""
    blocks = any(one.block >= 0 for one in found)
    several = "n" if sites else "block" if blocks else ""
    kinds = {one.dtype for one in found}
    columns = ["site", "layer", several, "dtype", "shape", "packets", "bytes", "ratio"]
    cells = [
        [
            one.site if "." not in one.site else "",  # else it is the name without the block
            one.name or "(the model)",
            count(getattr(one, "layers", 1)) if sites else str(one.block) * (one.block >= 0),
            one.dtype,
            one.shape,
            count(one.packets),
            size(one.bytes),
            "alias" if one.aliases == one.packets else ratio(one.ratio),
        ]
        for one in found
    ]
    shown = [place for place, title in enumerate(columns)
             if title and (title != "dtype" or len(kinds) > 1)]  # fmt: skip
    raw, stored = sum(one.raw_bytes for one in found), sum(one.bytes for one in found)
    total = (
        f"{count(sum(getattr(one, 'layers', 1) for one in found))} layers, "
        f"{count(sum(one.packets for one in found))} packets, {size(raw)} in {size(stored)}"
    )
    drawn = table(
        console,
        [columns[place] for place in shown],
        [[row[place] for place in shown] for row in cells],
        folds=("layer", "site", "shape"),
        numbers=("n", "block", "packets", "bytes", "ratio"),
    )
    return lines(drawn, total if len(kinds) > 1 else f"{total}, all {kinds.pop()}")


#: What is shown of rows' labels in place of their names.
_TITLES: Final = {
    "pass_index": "pass",
    "batch_item": "item",
    "position": "pos",
    "token_id": "id",
    "token_index": "index",
    "token_text": "text",
    "is_padding": "pad",
}


def tokens_screen(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int
) -> Group:
    """Show labels of rows, or tokens."""
    shown = [place for place, name in enumerate(columns)
             if name != "is_padding" or any(row[place] for row in rows)]  # fmt: skip
    titles = [_TITLES.get(columns[place], columns[place]) for place in shown]
    cells = [[_cell(row[place], columns[place]) for place in shown] for row in rows]
    numbers = [
        title
        for title, place in zip(titles, shown, strict=True)
        if all(isinstance(row[place], int | float) for row in rows)
    ]
    drawn = table(
        console,
        titles,
        cells,
        folds=[title for title in titles if title not in numbers],
        numbers=numbers,
    )
    more = f"… and {count(left)} more; --limit 0 shows all" if left else ""
    return lines(drawn, more) if more else lines(drawn)


def _cell(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:g}"
    if name in ("bytes", "raw_bytes"):
        return size(value)
    if name == "passes":
        return f"{value[0]}" if len(value) == 1 else f"{value[0]}–{value[-1]}" if value else ""
    return repr(value) if isinstance(value, str) else str(value)


def verified(console: Console, found: Any) -> Group:
    """Show what a verification found."""
    said = "intact" if found.ok else f"DAMAGED in {many(len(found.damage), 'place')}"
    checked = ", ".join(f"{count(many)} {name}" for name, many in found.checked.items())
    whole = "" if found.complete else "no: its writer ended early; what it committed is there"
    top = facts(
        [
            (found.kind, f"{found.path}: {said}"),
            ("checked", f"{checked}; {size(found.bytes)}"),
            ("closed", whole),
        ]
    )
    if found.ok:
        return lines(top)
    rows = [[one.where, count(one.offset) if one.offset >= 0 else "", one.reason]
            for one in found.damage]  # fmt: skip
    return lines(top, table(console, ["damaged", "at byte", "why"], rows,
                            folds=("damaged", "why"), numbers=("at byte",)))  # fmt: skip


def recovered(found: Any) -> Group:
    """Show what a recovery kept and lost."""
    same = found.path == found.recovered
    layers = _some([f"{name} {count(many)}" for name, many in found.lost_layers.items()])
    steps = _some([str(one) for one in found.lost_steps], 12)
    return lines(
        facts(
            [
                ("log", f"{found.path} is whole already" if same else str(found.recovered)),
                ("kept", f"{count(found.packets)} packets, {count(found.passes)} passes, "
                         f"{count(found.tokens)} tokens"),
                ("lost", "nothing that was committed" if found.whole else
                         f"{count(found.lost_packets)} committed packets, "
                         f"{count(len(found.lost_steps))} tokens"),
                ("of layers", layers),
                ("of passes", _some([str(one) for one in found.lost_passes], 12)),
                ("steps", steps),
                ("damaged", size(found.lost_bytes) if found.lost_bytes else ""),
                ("not committed", size(found.uncommitted_bytes)
                                  if found.uncommitted_bytes else ""),
                *((f"at byte {count(one.offset)}", one.reason) for one in found.damage[:20]),
            ]
        )
    )  # fmt: skip


def compacted(found: Any) -> Table:
    """Show what a compaction made."""
    return facts(_compacted(found))


def _compacted(found: Any) -> list[tuple[str, str]]:
    rows = ", ".join(f"{count(rows)} on {dim}" for dim, rows in found.rows.items())
    resumed = f", {count(found.shards_resumed)} of an earlier call" if found.shards_resumed else ""
    rate_said = rate(found.raw_bytes / max(found.seconds, 1e-9), "bytes")
    return [
        ("archive", str(found.path)),
        ("rows", f"{rows}; {count(len(found.variables))} variables"),
        (
            "bytes",
            f"{size(found.raw_bytes)} in {size(found.stored_bytes)}, {ratio(found.ratio)} smaller",
        ),
        (
            "verified",
            f"{count(found.shards_verified)} shards, "
            f"{count(found.chunks_verified)} chunks{resumed}",
        ),
        ("took", f"{duration(found.seconds)}, {rate_said}"),
    ]


def captured(fed: Any, said: Mapping[str, Any], report: Any) -> Table:
    """Show what a capture did."""
    skipped = f", {count(fed.skipped)} were there before" if fed.skipped else ""
    cut = f", {count(fed.truncated)} cut to what is fed" if fed.truncated else ""
    made = f", {count(fed.generated)} generated" if fed.generated else ""
    pairs = [
        ("log", str(fed.log) if said else "nothing was left to capture"),
        ("texts", f"{count(fed.samples)}{skipped}{cut}"),
        ("tokens", f"{count(fed.tokens)}{made}"),
    ]
    if said:
        seconds = max(said["duration_seconds"], 1e-9)
        tokens = rounded((fed.tokens + fed.generated) / seconds)
        pairs += [
            ("packets", f"{count(said['packets_written'])} in "
                        f"{many(said['passes'], 'pass', 'passes')}"),
            ("bytes", f"{size(said['raw_bytes'])} in {size(said['encoded_bytes'])}, "
                      f"{ratio(said['raw_bytes'] / max(said['encoded_bytes'], 1))} smaller"),
            ("took", f"{duration(seconds)}: {tokens} tokens/s, "
                     f"{rate(said['sustained_gbps'] * 1e9, 'bytes')}, "
                     f"hooks {said['share_in_hooks']:.1%} of it"),
        ]  # fmt: skip
    return facts([*pairs, *(_compacted(report) if report is not None else [])])


def measured(console: Console, found: Any) -> Group:
    """Show a benchmark."""
    rows = [
        ["capture, until it is on the disk", f"{found.capture_gbps:.2f} GB/s"],
        ["compact, verified", f"{found.compact_gbps:.2f} GB/s"],
        ["verify the archive", f"{found.verify_gbps:.2f} GB/s"],
        ["read a layer", f"{found.read_gbps:.2f} GB/s"],
        ["read 1,000 random rows of a layer", f"{found.rows_seconds * 1e3:.0f} ms"],
        ["log, smaller", ratio(found.log_ratio)],
        ["archive, smaller", ratio(found.archive_ratio)],
    ]
    total = f"{size(found.raw_bytes)} of bfloat16 in {duration(found.seconds)}"
    return lines(table(console, ["what", "measured"], rows, numbers=("measured",)), total)


def exchanged(found: Any) -> Table:
    """Show what an export or an import made, whatever says it."""
    given = {name: getattr(found, name) for name in found.__slots__}
    many = ("arrays", "chunks", "verified", "passes", "rows", "packets")
    nbytes = [f"{size(given[name])} {told}" for name, told in _BYTES.items() if name in given]
    return facts(
        [
            (str(given.get("kind") or given.get("format") or "archive"), str(found.path)),
            ("layers", _some([str(one) for one in given.get("layers", ())])),
            ("holds", ", ".join(f"{count(given[name])} {name}" for name in many if name in given)),
            ("left out", f"{count(given['left_out'])} rows" if given.get("left_out") else ""),
            ("bytes", ", ".join(nbytes)),
            ("took", duration(found.seconds)),
        ]
    )


#: What reports call bytes -> what is said of them.
_BYTES: Final = {"raw_bytes": "of values", "stored_bytes": "stored", "nbytes": "stored"}


def statistics(console: Console, found: Sequence[Mapping[str, Any]], *, each: bool) -> Group:
    """Show statistics of variables, or of layers."""
    shown = {"mean": "mean", "std": "std", "minimum": "min", "maximum": "max", "zeros": "zeros",
             "row_norm": "|row|"}  # fmt: skip
    odd = any(one["nonfinite"] for one in found)
    titles = ["variable", *(["block"] if each else []), *shown.values(), *(["nan, inf"] * odd)]
    rows = [
        [
            one["variable"],
            *([str(one["block"]) if one["block"] is not None else ""] if each else []),
            *(f"{one[name]:.1%}" if name == "zeros" else number(one[name]) for name in shown),
            *([count(one["nonfinite"])] * odd),
        ]
        for one in found
    ]
    values = count(sum(one["count"] for one in found))
    return lines(
        table(console, titles, rows, folds=("variable",), numbers=titles[1:]),
        f"{values} values, without padding" + ("" if odd else "; all are finite"),
    )


def leaving(console: Console, found: Sequence[Any]) -> Table:
    """Show what of an archive leaves."""
    rows = [[one.name, one.kind, count(one.size), one.examples] for one in found]
    titles = ("name", "what", "elements", "examples")
    return table(console, titles, rows, folds=("name", "examples"), numbers=("elements",))


def page_written(path: Any, nbytes: int) -> Table:
    """Show where a page is."""
    return facts([("page", str(path)), ("bytes", size(nbytes))])


def served(path: Any, address: str) -> Group:
    """Show where a page is served; the address on a line of its own."""
    return lines(f"serving {path}; Ctrl-C ends it", address)


def shared(console: Console, found: Any) -> Group:
    """Show what was made to be sent."""
    top = facts(
        [
            ("folder", str(found.path)),
            ("archive", str(found.data)),
            ("holds", f"{many(found.files, 'file')}, {size(found.nbytes)}; SHA256SUMS has them"),
        ]
    )
    return lines(top, "what leaves with it:", leaving(console, found.leaving))
