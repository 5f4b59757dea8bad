"""Owns making a folder that another lab can open, understand, and check: archive, card, manifest.

What is taken out before is ``privacy.py``'s; the words, ``card.py``'s; the JSON-LD,
``croissant.py``'s; the one file that an archive may be, ``exporting``'s.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from actstore import files
from actstore.archive import store
from actstore.archive.coordinates import prefix_of
from actstore.archive.redacting import check_names, copy_archive
from actstore.archive.root import read_root
from actstore.arguments import check_callable, check_memory
from actstore.buckets import local, local_target
from actstore.compaction import Pathlike, Progress, compact
from actstore.errors import ArchiveError, ConfigError
from actstore.exporting import export
from actstore.sharing.card import About, card, variables
from actstore.sharing.croissant import Resource, Table, describe
from actstore.sharing.privacy import Leaving, Privacy, leaving, shared_attributes
from actstore.verification import verify

__all__ = ["About", "Leaving", "Privacy", "Shared", "share", "what_leaves"]

MANIFEST: Final = "SHA256SUMS"
_CONTAINERS: Final = {"zarr": ".zarr", "zarr.zip": ".zarr.zip", "h5": ".h5"}
_ENCODINGS: Final = {
    ".zip": "application/zip",
    ".h5": "application/x-hdf5",
    ".json": "application/json",
    ".md": "text/markdown",
}
#: Of a model's folder what tells it and its tokenizer; weights by how their names end.
_IDENTITY: Final = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"),
)
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True, slots=True)
class Shared:
    """What was made to be shared.

    Attributes
    ----------
    path : Path
        The folder.
    data : Path
        The archive in it.
    files : int
        How many files it has, the manifest excepted.
    nbytes : int
        Their bytes.
    leaving : tuple of Leaving
        What of the archive is in it.
    """

    path: Path
    data: Path
    files: int
    nbytes: int
    leaving: tuple[Leaving, ...]


def share(  # noqa: PLR0913 - each is its own choice, by name
    source: Pathlike,
    target: Pathlike,
    *,
    about: About | None = None,
    privacy: Privacy | None = None,
    container: str = "zarr",
    model_folder: Pathlike | None = None,
    hash_weights: bool = False,
    max_memory_gb: float = 1.0,
    progress: Progress | None = None,
) -> Shared:
    """Make a folder to send: the archive, its data card, Croissant, tables and a manifest.

    It has ``README.md`` (the card), ``croissant.json``, a table of the labels for each token axis
    and one of the variables (JSON), ``SHA256SUMS`` for ``sha256sum -c``, and the archive. It
    appears whole and verified, or not at all. `what_leaves` lists what would be in it.

    Parameters
    ----------
    source : path
        An archive's folder, or a ``.stream`` log, which is compacted.
    target : path
        The folder, which must not exist.
    about : About, optional
        Name, description, licence, citation, creators.
    privacy : Privacy, optional
        What is taken out of the labels; nothing, if it isn't given.
    container : {"zarr", "zarr.zip", "h5"}
        What the archive is: a folder, or one file.
    model_folder : path, optional
        The model's: its configuration's and tokenizer's files are hashed.
    hash_weights : bool
        Hash those of its weights too.
    max_memory_gb, progress
        As for `compact`.

    Returns
    -------
    Shared
        What was made.

    Raises
    ------
    ConfigError
        An argument can't be honoured.
    ArchiveError
        ``target`` exists or can't be written, or the archive is damaged.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_dataset`.
    """
    check_memory(max_memory_gb)
    check_callable("progress", progress)
    _check_kind("about", about, About)
    _check_kind("privacy", privacy, Privacy)
    privacy = privacy or Privacy()
    if container not in _CONTAINERS:
        msg = f"container must be one of {', '.join(map(repr, _CONTAINERS))}; got {container!r}"
        raise ConfigError(msg)
    place = local(source, "share")
    hashes = _identity(model_folder, weights=hash_weights)
    target = local_target(target, "share")
    with files.appearing(target, folder=True, taken=ArchiveError) as folder:
        archive = _archive(place, folder, privacy, max_memory_gb, progress)
        root = read_root(archive)
        told = about or About(_stem(place))
        tables = [*_labels(archive, root, folder), _variables(root, folder)]
        data = archive
        if container != "zarr":
            data = folder / f"{_stem(place)}{_CONTAINERS[container]}"
            export(archive, data, max_memory_gb=max_memory_gb)
        listed = tuple(leaving(archive, Privacy()))
        names = [one.file for one in tables]
        text = card(root, told, data.name, {"files": hashes, "tables": names})
        if data is not archive:
            shutil.rmtree(archive)
        files.write_new(folder / "README.md", [text.encode()])
        made = {path: files.sha256(path) for path in _files(folder)}
        _croissant(folder, told, tables, data, made)
        count, nbytes = _manifest(folder, made)
    return Shared(target, target / data.name, count, nbytes, listed)


def what_leaves(source: Pathlike, *, privacy: Privacy | None = None) -> list[Leaving]:
    """List what of an archive would be in what `share` makes, with examples; nothing is written.

    Parameters
    ----------
    source : path
        An archive's folder.
    privacy : Privacy, optional
        As for `share`.

    Returns
    -------
    list of Leaving
        What tells most of what was read first: texts, ids, labels of yours.
    """
    _check_kind("privacy", privacy, Privacy)
    place = local(source, "what_leaves")
    if not place.is_dir():
        msg = f"{place} is no archive's folder: compact it first, then see what leaves"
        raise ConfigError(msg)
    return leaving(place, privacy or Privacy())


def _check_kind(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        msg = f"{name} must be an actstore.{kind.__name__}, or None; got {value!r}"
        raise ConfigError(msg)


def _archive(
    place: Path, folder: Path, privacy: Privacy, gigabytes: float, progress: Progress | None
) -> Path:
    """Put the archive into the folder as it is shared, and verify it."""
    made = place
    if not place.is_dir():
        made = folder / ".source.zarr"
        compact(place, made, max_memory_gb=gigabytes, progress=progress)
    root = read_root(made)
    check_names(made, root)
    target = folder / f"{_stem(place)}.zarr"
    said = shared_attributes(root["attributes"], privacy)
    copy_archive(made, target, privacy.changed(made, root), said)
    if made is not place:
        shutil.rmtree(made)
    report = verify(target)
    if not report.ok:
        msg = f"{place} is damaged, and was not shared: {report.damage[0]}; see actstore.verify"
        raise ArchiveError(msg)
    return target


def _stem(place: Path) -> str:
    return place.name.removesuffix(".zarr").removesuffix(".stream") or "activations"


def _labels(archive: Path, root: Mapping[str, Any], folder: Path) -> list[Table]:
    """Write the labels of each token axis as columns."""
    found = []
    with store.open_xarray(archive) as held:
        for dim in root["attributes"]["rows"]:
            columns = {
                str(name): one.values
                for name, one in held.coords.items()
                if one.dims == (dim,) and name != dim
            }
            prefix = prefix_of(columns) or ""
            named = {name.removeprefix(prefix): one for name, one in columns.items()}
            found.append(_table(folder, f"{dim}s", named, f"A record for each row of {dim}."))
    return found


def _variables(root: Mapping[str, Any], folder: Path) -> Table:
    lines = variables(root)
    keys = ("variable", "site", "hook_point", "model_dtype", "stored_dtype", "precision")
    columns: dict[str, Any] = {key: np.array([one[key] for one in lines], object) for key in keys}
    for key in ("modules", "dims", "shape"):
        columns[key] = np.array([json.dumps(one[key]) for one in lines], object)
    columns["worst_nmse"] = np.array([one["worst_nmse"] for one in lines], np.float64)
    return _table(folder, "variables", columns, "A record for each array of values.")


def _table(folder: Path, name: str, columns: Mapping[str, Any], description: str) -> Table:
    """Write columns as JSON, which has text as it is; numbers that are none are null."""
    plain = {
        key: [
            None if isinstance(one, float) and not math.isfinite(one) else one
            for one in values.tolist()
        ]
        for key, values in columns.items()
    }
    data = json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    files.write_new(folder / f"{name}.json", [data])
    kinds = {key: values.dtype.kind for key, values in columns.items()}
    return Table(name, f"{name}.json", kinds, description)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _croissant(
    folder: Path,
    about: About,
    tables: Sequence[Table],
    data: Path,
    hashes: Mapping[Path, str],
) -> None:
    described = {one.file: one.description for one in tables}
    described |= {"README.md": "The data card.", data.name: "The archive."}
    resources = [
        Resource(
            path.name,
            _ENCODINGS[path.suffix],
            path.stat().st_size,
            digest,
            described[path.name],
        )
        for path, digest in hashes.items()
        if path.parent == folder
    ]
    whole = data.name if data.is_dir() else None
    said = describe(about, resources, tables, datetime.now(UTC).date().isoformat(), whole)
    text = json.dumps(said, indent=2, ensure_ascii=False)
    files.write_new(folder / "croissant.json", [text.encode()])


def _manifest(folder: Path, hashes: Mapping[Path, str]) -> tuple[int, int]:
    """Write the hash of every file, as ``sha256sum`` has it; give their number and bytes."""
    paths = _files(folder)
    lines = [
        f"{hashes.get(path) or files.sha256(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in paths
    ]
    files.write_new(folder / MANIFEST, ["".join(lines).encode()])
    return len(paths), sum(path.stat().st_size for path in paths)


def _identity(given: Pathlike | None, *, weights: bool) -> dict[str, str]:
    """Hash the files of a model's folder."""
    if given is None:
        if weights:
            msg = "hash_weights wants model_folder: the folder that has them"
            raise ConfigError(msg)
        return {}
    folder = Path(given)
    if not folder.is_dir():
        msg = f"model_folder must be the folder of a model; {str(folder)!r} is none"
        raise ConfigError(msg)
    found = [folder / name for name in _IDENTITY if (folder / name).is_file()]
    if weights:
        found += [one for one in sorted(folder.iterdir()) if one.suffix in _WEIGHTS]
    return {path.name: files.sha256(path) for path in found}
