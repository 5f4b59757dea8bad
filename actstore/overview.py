"""Owns what a file says of itself: run, model, layers, bytes, and errors, with no value read.

Whether that is true is ``verification``'s; the dataset that it is, ``dataset``'s.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeVar

from actstore import files, hdf5
from actstore.archive.root import read_attributes
from actstore.archive.zipped import ZipPath, is_zip, size_of
from actstore.buckets import RemotePath, place_of
from actstore.errors import ConfigError, FormatError
from actstore.stream import summary
from actstore.stream.reader import StreamReader, open_stream

__all__ = [
    "ORDERS",
    "LayerLine",
    "Overview",
    "SiteLine",
    "analysis_of",
    "archive_root",
    "layer_lines",
    "site_lines",
]

Line = TypeVar("Line", bound="LayerLine")


@dataclass(frozen=True, slots=True)
class Overview:
    """What a log or an archive says of itself.

    Attributes
    ----------
    path : str
        As it was given.
    kind : {"log", "legacy log", "archive", "zip", "HDF5"}
        What it is.
    runs : tuple of mapping
        The HEADER of each log: ``models``, ``capture``, ``run_id``, ``created``, ….
    rows : mapping of str to int
        Rows of each token axis.
    passes, tokens, packets : int
        Counts of them.
    raw_bytes, stored_bytes, file_bytes : int
        Of the values in the model's dtype, of them as they are stored, and of all files.
    dtypes : tuple of str
        The model's own, of the values.
    compression : str
        The log's codec, or the archive's profile.
    precision : mapping of str to str
        Variable -> what is kept of it, of those that give up some.
    complete : bool
        The log, or each that the archive is made of, was closed cleanly.
    writing : bool
        A capture is writing it.
    damage : tuple of str
        What was seen to be damaged, without looking for it.
    per_layer : mapping of str to mapping
        As `analyze_activations` gives it, with ``errors`` where precision was given up.
    summary : mapping
        What the run says of itself at its end.
    provenance : mapping
        Of an archive: its writer, when it was made, its logs.
    """

    path: str
    kind: str
    runs: tuple[Mapping[str, Any], ...]
    rows: Mapping[str, int]
    passes: int
    tokens: int
    packets: int
    raw_bytes: int
    stored_bytes: int
    file_bytes: int
    dtypes: tuple[str, ...]
    compression: str
    precision: Mapping[str, str]
    complete: bool
    writing: bool
    damage: tuple[str, ...]
    per_layer: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def ratio(self) -> float:
        """Raw bytes over stored bytes."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Overview:
        """Read what a file says of itself.

        Parameters
        ----------
        path : path
            A log or an archive, of any container; or the URL of one in a bucket.
        storage_options : mapping, optional
            Of a bucket, as for `actstore.open_dataset`.

        Raises
        ------
        MissingFileError
            There is nothing at that path.
        FormatError
            It is neither a log nor an archive.
        """
        place = place_of(path, "info", storage_options)
        found = archive_root(place)
        if found is not None:
            kind, said = found
            return cls._of_archive(place, kind, said, size_of(place))
        with open_stream(place, errors="skip") as reader:
            return cls._of_log(place, reader)

    @classmethod
    def _of_archive(
        cls, place: Path | RemotePath, kind: str, said: Mapping[str, Any], file_bytes: int
    ) -> Overview:
        found = said["analysis"]
        return cls(
            str(place),
            kind,
            tuple(said["runs"]),
            dict(said["rows"]),
            file_bytes=file_bytes,
            compression=said["profile"],
            precision=dict(said.get("precision", {})),
            writing=False,
            damage=(),
            provenance=said["provenance"],
            **_counts(found),
        )

    @classmethod
    def _of_log(cls, place: Path | RemotePath, reader: StreamReader) -> Overview:
        found = summary.summarise(reader)
        rows = Counter[str]()
        for one in reader.passes:
            rows.update({axis.name: axis.rows for axis in one.axes})
        legacy = type(reader) is not StreamReader
        return cls(
            str(place),
            "legacy log" if legacy else "log",
            (dict(reader.header),),
            {name: count for name, count in rows.items() if count},
            file_bytes=found["file_bytes"],
            compression=found["compression"] or "none",
            precision={},
            writing=isinstance(place, Path) and files.is_locked(place),
            damage=tuple(f"byte {one.offset}: {one.reason}" for one in reader.damage),
            provenance={},
            **_counts(found),
        )


def analysis_of(
    path: str | os.PathLike[str],
    asked: str,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Count what a log or an archive holds, as ``analyze_activations`` gives it.

    Raises
    ------
    ConfigError
        It is no path; ``asked`` is who wants one.
    MissingFileError, FormatError, StreamCorruptError
        There is nothing; it is neither; it is a damaged log.
    """
    place = place_of(path, asked, storage_options)
    found = archive_root(place)
    if found is not None:
        return {"stream_path": str(place), **found[1]["analysis"]}
    with open_stream(place) as reader:
        reader.check()
        return summary.summarise(reader)


def archive_root(place: Path | RemotePath) -> tuple[str, Mapping[str, Any]] | None:
    """Give the container that an archive is, and the attributes of its root; None of a log."""
    if isinstance(place, RemotePath):
        try:
            return "archive", read_attributes(place)
        except FormatError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            return None
    if place.is_dir():
        return "archive", read_attributes(place)
    if is_zip(place):
        return "zip", read_attributes(ZipPath(place))
    if hdf5.is_hdf5(place):
        hdf5.check_installed()
        from actstore.hdf5.reading import Hdf5Archive

        with Hdf5Archive(place) as archive:
            return "HDF5", archive.root["attributes"]
    return None


def _counts(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "passes": found["passes"],
        "tokens": found["tokens"],
        "packets": found["packets"],
        "raw_bytes": found["total_raw_bytes"],
        "stored_bytes": found["total_compressed_bytes"],
        "dtypes": tuple(found["dtypes"]),
        "complete": bool(found["complete"]),
        "per_layer": found["per_layer"],
        "summary": found["summary"],
    }


@dataclass(frozen=True, slots=True)
class LayerLine:
    """A layer of a file.

    Attributes
    ----------
    name, site : str
        Its name, and the variable that it is.
    block : int
        The index of its block; -1 outside of blocks.
    dtype, shape : str
        Of its packets; what differs among them is ``*`` in the shape.
    packets, raw_bytes, bytes, aliases : int
        Packets, their bytes, as they are stored, and how many only repeat another layer's.
    """

    name: str
    site: str
    block: int
    dtype: str
    shape: str
    packets: int
    raw_bytes: int
    bytes: int
    aliases: int

    @property
    def ratio(self) -> float | None:
        """Raw bytes over stored bytes; None where there are none."""
        return self.raw_bytes / self.bytes if self.bytes else None


@dataclass(frozen=True, slots=True)
class SiteLine(LayerLine):
    """Layers that are the same in every block; ``name`` has ``{first..last}`` for its index.

    Attributes
    ----------
    layers : int
        How many there are.
    """

    layers: int = 1


#: What lines can be sorted by -> its key.
ORDERS: Final[dict[str, Callable[[Any], Any]]] = {
    "name": lambda one: one.name,
    "packets": lambda one: -one.packets,
    "bytes": lambda one: -one.bytes,
    "ratio": lambda one: -(one.ratio or 0),
}


def layer_lines(
    per_layer: Mapping[str, Mapping[str, Any]],
    globs: Iterable[str] = (),
    order: str | None = None,
) -> list[LayerLine]:
    """List layers.

    Parameters
    ----------
    per_layer : mapping
        As `Overview` has it.
    globs : iterable of str, optional
        Only those whose name or site matches any.
    order : {"name", "packets", "bytes", "ratio"}, optional
        The largest first, but names; by default, as they were first captured.

    Raises
    ------
    ConfigError
        Nothing matches.
    """
    wanted = list(globs)
    lines = [
        LayerLine(
            name,
            said["site"],
            said["block"],
            "+".join(said["dtypes"]),
            _shape(said["shapes"]),
            said["count"],
            said["raw_bytes"],
            said["bytes"],
            said["aliases"],
        )
        for name, said in per_layer.items()
        if not wanted or any(fnmatchcase(one, glob) for one in (name, said["site"])
                             for glob in wanted)
    ]  # fmt: skip
    if wanted and not lines:
        some = ", ".join(map(repr, list(per_layer)[:5]))
        msg = f"no layer or site matches {', '.join(map(repr, wanted))}; there are {some}, …"
        raise ConfigError(msg)
    return _sorted(lines, order)


def site_lines(lines: Sequence[LayerLine], order: str | None = None) -> list[SiteLine]:
    """Put the layers of a site together, where they differ in nothing but the block's index."""
    common = Counter(pattern for one in lines for pattern in _patterns(one))
    groups: dict[tuple[str, ...], list[LayerLine]] = {}
    for one in lines:
        pattern = max(_patterns(one), key=lambda pattern: common[pattern], default=one.name)
        groups.setdefault((pattern, one.site, one.dtype, one.shape), []).append(one)
    found = []
    for (pattern, site, dtype, shape), mine in groups.items():
        first, blocks = mine[0], sorted(one.block for one in mine)
        name = pattern.replace("{}", _span(blocks), 1) if len(mine) > 1 else first.name
        sums = (
            sum(one.packets for one in mine),
            sum(one.raw_bytes for one in mine),
            sum(one.bytes for one in mine),
            sum(one.aliases for one in mine),
        )
        block = first.block if len(mine) == 1 else -1
        found.append(SiteLine(name, site, block, dtype, shape, *sums, layers=len(mine)))
    return _sorted(found, order)


def _sorted(lines: list[Line], order: str | None) -> list[Line]:
    return lines if order is None else sorted(lines, key=ORDERS[order])


def _patterns(one: LayerLine) -> list[str]:
    """Give a layer's name with ``{}`` in each place that may be its block's index."""
    parts = one.name.split(".")
    return [
        ".".join([*parts[:place], "{}", *parts[place + 1 :]])
        for place, part in enumerate(parts)
        if part == str(one.block)
    ]


def _span(blocks: Sequence[int]) -> str:
    if blocks[-1] - blocks[0] == len(blocks) - 1:
        return f"{{{blocks[0]}..{blocks[-1]}}}"
    if len(blocks) <= 4:
        return f"{{{','.join(map(str, blocks))}}}"
    return f"{{{blocks[0]},{blocks[1]},…,{blocks[-1]}}}"


def _shape(shapes: Sequence[Sequence[int]]) -> str:
    """Give the shape that packets have in common."""
    if len({len(one) for one in shapes}) > 1:
        return "*"
    lengths = (set(column) for column in zip(*shapes, strict=True))
    return "×".join(str(one.pop()) if len(one) == 1 else "*" for one in lengths)
