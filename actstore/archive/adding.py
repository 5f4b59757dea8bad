"""Owns adding small arrays to a finished archive, and taking them out again; all else stays.

New arrays are written beside those that there are, and made durable; then the root's metadata,
which alone says what is in the archive, is replaced at once. A folder that the root doesn't name
is no part of it: readers and ``verify`` pass it over, and who needs its name clears it away.

Names can't be changed like that, so arrays of a name that is taken come into another archive, made
beside of links to the files of this one; then the two change names.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from actstore import __version__, files
from actstore.archive import store
from actstore.archive.alignment import CANONICAL
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.names import GROUPS, STATISTICS, clean, leads_out
from actstore.archive.precision import EXACT, SCALE
from actstore.archive.root import FORMAT, metadata_crc, read_root
from actstore.errors import ActstoreError, ArchiveError, ConfigError

__all__ = ["ADDED", "add_arrays", "only_writer", "remove_arrays"]

#: The root attribute that has what was added, by its path.
ADDED: Final = "added"
_DTYPES: Final = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_TEXT: Final = "text"
Nodes = Mapping[str, Mapping[str, Any]]


def add_arrays(
    folder: Path,
    arrays: Sequence[Coordinate],
    *,
    group: str = "",
    attributes: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Add small arrays to an archive; whoever opens it finds all of them, or none.

    Killed at any moment, it leaves the archive as it was, or as it will be. Values are neither
    read nor written. Datasets that are open stay as they are, those of what is replaced excepted:
    open them again.

    Parameters
    ----------
    folder : Path
        The archive, on a local disk.
    arrays : sequence of Coordinate
        What to add: numbers, bools, or text (of dtype `STRING`). Each is held in memory.
    group : str
        Where: ``""``, as coordinates of the dimensions that the archive has; or
        ``"statistics/<name>"``, a group of its own, with whatever dimensions.
    attributes : mapping, optional
        Attributes of that group, as JSON; ``coordinates`` among them names, separated by spaces,
        those of its arrays that are labels to xarray.
    replace : bool
        Whether what was added by the same name before, a group as a whole, is replaced; else it
        is refused. What compaction wrote never is.

    Raises
    ------
    ConfigError
        A name is taken, or can't be an array's; an array has another dtype, or dimensions that
        are not the archive's.
    ArchiveError
        Another process is writing this archive; its metadata is damaged; or it can't be written.
    """
    _check(arrays, group, attributes)
    with only_writer(folder) as place, _errors(place):
        root = _read_root(place)
        below: Nodes = root["consolidated_metadata"]["metadata"]
        known: Mapping[str, Any] = root["attributes"].get(ADDED, {})
        paths = [group] if group else [one.name for one in arrays]
        old = [path for path in paths if path in known]
        if old and not replace:
            msg = (
                f"{', '.join(map(repr, old))} was added to {folder} before: replace it with "
                "replace=True, or give another name"
            )
            raise ConfigError(msg)
        _check_names([path for path in paths if path not in known], root)
        if not group:
            _check_dims(arrays, below)
        kept, said = _without(old, root)
        shutil.rmtree(_beside(place), ignore_errors=True)  # of a call that was killed
        target = place
        if old:
            target = _linked(place, kept)
        made = _written(target, arrays, group, attributes or {}, kept)
        said = _with(paths, arrays if not group else (), said)
        store.ArchiveWriter(target).write_root(said, {**kept, **made})
        if old:
            files.exchange(target, place)
            shutil.rmtree(target)


def remove_arrays(folder: Path, paths: Iterable[str]) -> None:
    """Take out of an archive what `add_arrays` added; all of it at once.

    Parameters
    ----------
    folder : Path
        The archive.
    paths : iterable of str
        Names of coordinates, and groups: ``"statistics/<name>"``.

    Raises
    ------
    ConfigError
        Something was not added.
    ArchiveError
        As for `add_arrays`.
    """
    gone = list(dict.fromkeys(paths))
    with only_writer(folder) as place, _errors(place):
        root = _read_root(place)
        known = root["attributes"].get(ADDED, {})
        odd = [path for path in gone if path not in known]
        if odd:
            there = ", ".join(map(repr, known)) or "nothing"
            msg = f"{', '.join(map(repr, odd))} was not added to {folder}; {there} was"
            raise ConfigError(msg)
        kept, said = _without(gone, root)
        store.ArchiveWriter(place).write_root(said, kept)
        below: Nodes = root["consolidated_metadata"]["metadata"]
        for name in below.keys() - kept.keys():
            shutil.rmtree(place / name, ignore_errors=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[Path]:
    """Be the only process that writes to a finished archive; gives where it really is.

    Raises
    ------
    ArchiveError
        Another is; the message says which.
    """
    place = folder.resolve()
    path = place.with_name(f".{place.name}.lock")
    try:
        descriptor = files.take(path)
    except files.LockedError as error:
        holder = "another process"
        with suppress(OSError, ValueError):
            holder = path.read_bytes()[:200].decode() or holder
        msg = f"{holder} is writing to {folder}; wait for it to end"
        raise ArchiveError(msg) from error
    except OSError as error:
        msg = f"{folder} can't be written to: its lock {path} can't be made: {error}"
        raise ArchiveError(msg) from error
    try:
        os.ftruncate(descriptor, 0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        os.write(descriptor, f"process {os.getpid()} of {socket.gethostname()} ({now})".encode())
        yield place
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def _errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, ActstoreError):
            raise
        msg = f"{place} could not be written to, and is as it was or as wanted: {error}"
        raise ArchiveError(msg) from error


def _read_root(place: Path) -> dict[str, Any]:
    root = read_root(place)
    wanted, found = metadata_crc((place / "zarr.json").read_bytes())
    if wanted != found:
        msg = f"the metadata of {place} is damaged: see actstore.verify, and compact again"
        raise ArchiveError(msg)
    for name in root["consolidated_metadata"]["metadata"]:
        if leads_out(name):
            msg = f"{place} names something outside of itself: {name!r}; see actstore.verify"
            raise ArchiveError(msg)
    return root


# -- what may be added --------------------------------------------------------------------------


def _check(arrays: Sequence[Coordinate], group: str, attributes: Mapping[str, Any] | None) -> None:
    """Refuse what no archive takes."""
    if not arrays:
        msg = "there is nothing to add: give arrays"
        raise ConfigError(msg)
    head, _, name = group.partition("/")
    if group and head != STATISTICS:
        msg = f"group must be '' or '{STATISTICS}/<name>'; got {group!r}"
        raise ConfigError(msg)
    if attributes and not group:
        msg = "attributes are those of a group; coordinates have none"
        raise ConfigError(msg)
    names = [one.name for one in arrays]
    for one in (*names, *(name,) * bool(group)):
        if not isinstance(one, str) or one != clean(one):
            better = clean(str(one))
            msg = f"{one!r} can't be the name of an array in an archive; {better!r} can"
            raise ConfigError(msg)
    if len({one.casefold() for one in names}) < len(names):
        msg = f"of the names {names!r} some differ only in case, or not at all"
        raise ConfigError(msg)
    sizes: dict[str, int] = {}
    for array in arrays:
        _check_array(array, sizes)


def _check_array(one: Coordinate, sizes: dict[str, int]) -> None:
    """Refuse an array that isn't one, or doesn't go with those before it."""
    kind, shape = one.values.dtype, one.values.shape
    if kind != STRING and kind.name not in _DTYPES:
        msg = f"{one.name!r} is of dtype {kind}; numbers, bools and text can be added"
        raise ConfigError(msg)
    if len(one.dims) != len(shape) or len(set(one.dims)) < len(one.dims):
        msg = f"{one.name!r} of shape {shape} can't have the dimensions {one.dims}"
        raise ConfigError(msg)
    for dim, size in zip(one.dims, shape, strict=True):
        if sizes.setdefault(dim, size) != size or dim != clean(dim):
            msg = f"{one.name!r} has a dimension {dim!r} of {size}; {sizes[dim]} is another's"
            raise ConfigError(msg)


def _check_names(paths: Iterable[str], root: Mapping[str, Any]) -> None:
    """Refuse names that something has, or could be taken for."""
    below: Nodes = root["consolidated_metadata"]["metadata"]
    top = {name.partition("/")[0] for name in below} | set(_sizes(below))
    values = {name for name, said in below.items() if "source_dtype" in said["attributes"]}
    known = {*CANONICAL, *GROUPS, STATISTICS, "zarr.json", *top, *root["attributes"]["aliases"]}
    known |= {f"{name}{end}" for name in values for end in ("_present", SCALE, EXACT)}
    known |= set(root["attributes"].get(ADDED, ()))
    taken = {one.casefold() for one in known}
    for path in paths:
        if path.casefold() in taken:
            msg = f"the name {path!r} is taken in the archive, or kept for what it may hold"
            raise ConfigError(msg)
        if f"_{path}".endswith("_pass_index"):  # by that a token axis is known
            msg = f"the name {path!r} is kept for passes; give another"
            raise ConfigError(msg)


def _check_dims(arrays: Iterable[Coordinate], below: Nodes) -> None:
    """Refuse coordinates of anything but the archive's own dimensions."""
    sizes = _sizes(below)
    for one in arrays:
        for dim, size in zip(one.dims, one.values.shape, strict=True):
            if sizes.get(dim) != size:
                there = ", ".join(f"{name}: {length}" for name, length in sizes.items())
                msg = f"{one.name!r} has {size} values on {dim!r}; the archive has {there}"
                raise ConfigError(msg)
        if not one.dims:
            msg = f"{one.name!r} labels no dimension"
            raise ConfigError(msg)


def _sizes(below: Nodes) -> dict[str, int]:
    """Give the dimensions of the root's arrays."""
    return {
        dim: size
        for name, said in below.items()
        if said["node_type"] == "array" and "/" not in name
        for dim, size in zip(said["dimension_names"], said["shape"], strict=True)
    }


# -- what the root says -------------------------------------------------------------------------


def _of(path: str, below: Nodes) -> set[str]:
    """Give the nodes of something that was added: of a coordinate, or of a group."""
    texts = {f"{_TEXT}/{path}_bytes", f"{_TEXT}/{path}_offsets"}
    heads = (f"{path}/", f"{_TEXT}/{path}/")
    whole = {path, *(texts if "/" not in path else {f"{_TEXT}/{path}"})}
    return {name for name in below if name in whole or name.startswith(heads)}


def _without(
    gone: Sequence[str], root: Mapping[str, Any]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Any]]:
    """Give the nodes and the attributes that a root has without something that was added."""
    below: Nodes = root["consolidated_metadata"]["metadata"]
    lost = {name for path in gone for name in _of(path, below)}
    kept = {name: said for name, said in below.items() if name not in lost}
    for group in (STATISTICS, f"{_TEXT}/{STATISTICS}"):
        if not any(name.startswith(f"{group}/") for name in kept):
            kept.pop(group, None)
    attributes = dict(root["attributes"])
    labels = attributes["coordinates"].split()
    attributes["coordinates"] = " ".join(name for name in labels if name not in lost)
    added = {path: said for path, said in attributes.pop(ADDED, {}).items() if path not in gone}
    return kept, attributes | ({ADDED: added} if added else {})


def _with(
    paths: Iterable[str], labels: Iterable[Coordinate], attributes: Mapping[str, Any]
) -> dict[str, Any]:
    """Give the attributes that a root has with something added."""
    said = {
        "created": datetime.now(UTC).isoformat(),
        "writer": {"name": FORMAT, "version": __version__},
    }
    return {
        **attributes,
        "coordinates": " ".join(
            [*attributes["coordinates"].split(), *(one.name for one in labels)]
        ),
        ADDED: {**attributes.get(ADDED, {}), **dict.fromkeys(paths, said)},
    }


# -- files --------------------------------------------------------------------------------------


def _written(
    folder: Path,
    arrays: Sequence[Coordinate],
    group: str,
    attributes: Mapping[str, Any],
    kept: Nodes,
) -> dict[str, Any]:
    """Write arrays where the root doesn't name them yet, durably; give their metadata."""
    writer = store.ArchiveWriter(folder)
    text = [one for one in arrays if one.values.dtype == STRING]
    groups = _groups(group, text=bool(text))
    texts = f"{_TEXT}/{group}" if group else _TEXT
    tops = [one for one in groups if one not in kept] if group else []
    tops += [] if group else [one.name for one in arrays]
    tops += [f"{texts}/{one.name}_{end}" for one in text for end in ("bytes", "offsets")]
    for place in (folder / name for name in tops):  # what a killed call left
        if place.exists():
            shutil.rmtree(place)
    try:
        for name in groups:
            if name not in kept:
                writer.add_group(name, attributes if name == group else {})
        for one in arrays:
            writer.add_small(one, group)
            _check_written(folder, f"{group}/{one.name}".lstrip("/"), one)
        for one in text:
            writer.add_text(one, texts)
        _sync(folder / name for name in tops)
        return writer.nodes(*tops)
    except BaseException:
        for name in tops:
            shutil.rmtree(folder / name, ignore_errors=True)
        raise


def _sync(places: Iterable[Path]) -> None:
    """Make folders durable, all that is in them, and their names."""
    for place in places:
        for path in place.rglob("*"):
            (files.fsync_folder if path.is_dir() else files.fsync_file)(path)
        files.fsync_folder(place)
        files.fsync_folder(place.parent)


def _groups(group: str, *, text: bool) -> list[str]:
    """Give the groups that a group needs, outer ones first."""
    if not group:
        return []
    found = [STATISTICS, group]
    return found + ([f"{_TEXT}/{one}" for one in found] if text else [])


def _check_written(folder: Path, name: str, one: Coordinate) -> None:
    """Compare what was written, read by zarr-python, with what was to be."""
    found = store.read_part(folder, name, (slice(None),) * one.values.ndim)
    if one.values.dtype == STRING:
        same = np.array_equal(found.astype(STRING), one.values)
    else:
        same = found.dtype == one.values.dtype and found.tobytes() == one.values.tobytes()
    if not same:
        msg = f"{folder}: {one.name!r} doesn't read back as it was written"
        raise ArchiveError(msg)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _linked(folder: Path, nodes: Nodes) -> Path:
    """Make an archive beside of links to the files of some nodes; it has no root yet."""
    target = _beside(folder)
    target.mkdir()
    try:
        for name, said in nodes.items():
            whole = said["node_type"] == "array"
            for path in (folder / name).rglob("*") if whole else [folder / name / "zarr.json"]:
                if not path.is_dir():
                    place = target / path.relative_to(folder)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.hardlink_to(path)
        for path in sorted(target.rglob("*")):
            if path.is_dir():
                files.fsync_folder(path)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        msg = (
            f"{folder} can't be replaced in one step, since its files can't be linked to "
            f"({error}): remove what is to be replaced, then add it"
        )
        raise ArchiveError(msg) from error
    return target
