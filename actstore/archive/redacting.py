"""Owns copying an archive with some of its small arrays changed or left out; values stay as files.

What is sensitive in an archive, others decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from actstore import files
from actstore.archive import store
from actstore.archive.adding import ADDED
from actstore.archive.coordinates import STRING, Coordinate
from actstore.errors import ArchiveError

__all__ = ["copy_archive"]


def copy_archive(
    folder: Path,
    target: Path,
    changed: Mapping[str, NDArray[Any] | None],
    attributes: Mapping[str, Any],
) -> None:
    """Copy an archive, linking to its files where that can be; the copy's root is written last.

    Parameters
    ----------
    folder, target : Path
        The archive, and what is to be one: it must not exist.
    changed : mapping of str to numpy.ndarray or None
        Arrays of labels by their path, and what they hold instead, of the same shape; None: they
        are left out, as is a group with all that is in it.
    attributes : mapping
        Root attributes that take the place of those that there are.

    Raises
    ------
    ArchiveError
        A part of the archive is gone.
    """
    root = store.read_root(folder)
    below: Mapping[str, Any] = root["consolidated_metadata"]["metadata"]
    gone = {name for name, values in changed.items() if values is None}
    lost = {
        name
        for name in below
        if any(name == one or name.startswith(f"{one}/") for one in gone)
        or any(name in _texts(one) for one in changed)
    }
    fresh = {name: values for name, values in changed.items() if values is not None}
    target.mkdir()
    writer = store.ArchiveWriter(target)
    for name, said in below.items():
        if name not in lost and name not in fresh:
            _link(folder, target, name, whole=said["node_type"] == "array")
    for name, values in fresh.items():
        group, _, own = name.rpartition("/")
        label = Coordinate(own, tuple(below[name]["dimension_names"]), values)
        writer.add_small(label, group)
        if values.dtype == STRING and not group:
            writer.add_text(label)
    said = {**root["attributes"], **attributes}
    labels = [name for name in said["coordinates"].split() if name not in lost]
    added = {name: one for name, one in said.pop(ADDED, {}).items() if name not in lost}
    said |= {"coordinates": " ".join(labels)} | ({ADDED: added} if added else {})
    for path in sorted(target.rglob("*")):
        (files.fsync_folder if path.is_dir() else files.fsync_file)(path)
    writer.write_root(said, writer.nodes("."))


def _texts(name: str) -> tuple[str, str]:
    return f"text/{name}_bytes", f"text/{name}_offsets"


def _link(folder: Path, target: Path, name: str, *, whole: bool) -> None:
    paths = (folder / name).rglob("*") if whole else [folder / name / "zarr.json"]
    for path in paths:
        if path.is_dir():
            continue
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            files.link_or_copy(path, place)
        except FileNotFoundError as error:
            msg = f"{path} is gone: see actstore.verify"
            raise ArchiveError(msg) from error
