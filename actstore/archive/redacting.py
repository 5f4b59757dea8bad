"""Owns copying an archive with some of its small arrays changed or left out; values stay as files.

What is sensitive in an archive, others decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from numpy.typing import NDArray

from actstore import files
from actstore.archive import store
from actstore.archive.adding import ADDED
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.names import clean, leads_out
from actstore.archive.root import arrays_of, read_root
from actstore.errors import ArchiveError

__all__ = ["check_names", "copy_archive"]


def check_names(folder: Path, root: Mapping[str, Any]) -> None:
    """Refuse an archive whose root names anything that could lead out of its folder.

    Raises
    ------
    ArchiveError
        It does, or it names a token axis that nothing has.
    """
    below = root["consolidated_metadata"]["metadata"]
    for name in below:
        if leads_out(name) or "\\" in name:
            msg = f"{folder} names something outside of itself: {name!r}; see actstore.verify"
            raise ArchiveError(msg)
    dims = {dim for one in arrays_of(root).values() for dim in one.get("dimension_names", ())}
    for dim in root["attributes"]["rows"]:
        if dim != clean(dim) or dim not in dims:
            msg = f"{folder} has no dimension {dim!r}, of which its root says rows"
            raise ArchiveError(msg)


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
        A part of the archive is gone, or leads out of it.
    """
    root = read_root(folder)
    check_names(folder, root)
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
    """Link to the metadata of a node and, of an array, to its chunks; to nothing else there."""
    chunks = sorted((folder / name / "c").rglob("*")) or [folder / name / "c"] if whole else []
    for path in [folder / name / "zarr.json", *chunks]:
        keys = path.relative_to(folder / name).parts[1:]
        if path.is_dir() and not path.is_symlink():
            continue
        if not all(one.isdecimal() for one in keys) or (chunks == [path] and not path.exists()):
            continue  # no chunk; or the array has none
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            inside = path.resolve(strict=True).is_relative_to(folder.resolve())
            if not inside or not S_ISREG(path.lstat().st_mode):
                msg = f"{path} is a link, or no file: an archive has none such"
                raise ArchiveError(msg)
            files.link_or_copy(path, place)
        except FileNotFoundError as error:
            msg = f"{path} is gone: see actstore.verify"
            raise ArchiveError(msg) from error
