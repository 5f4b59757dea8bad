"""Owns what of an archive tells what was read: which labels, what is done to them, what leaves."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.archive import store
from actstore.archive.coordinates import ROW_LABELS, RUN, SOURCE_ROW, STRING, prefix_of
from actstore.archive.precision import EXACT, SCALE
from actstore.archive.redacting import check_names
from actstore.archive.root import arrays_of, read_root
from actstore.arguments import check_strings
from actstore.errors import ConfigError

__all__ = ["Leaving", "Privacy", "leaving"]

_TEXT, _ID = "token_text", "token_id"
_EXAMPLES: Final = 3
_LOOKED_AT: Final = 10_000  # elements, for examples
_ROOM: Final = 60  # characters of examples
#: What is kept of an import's own words where anything is taken out.
_OF_IMPORTS: Final = ("kind", "package", "version", "writer")
_DIGITS: Final = 16  # of a hash, hexadecimal
_IDS: Final = 1 << 53  # what every JSON parser holds


@dataclass(frozen=True, slots=True)
class Privacy:
    """What the sender takes out.

    Parameters
    ----------
    drop_text : bool
        All texts of tokens are empty.
    drop_token_ids : bool
        All ids of tokens are −1.
    hash_text : str, optional
        A key. Texts are the first 16 digits of their HMAC-SHA256 by it, ids 53 bits of theirs:
        equal tokens can be told from others. That hides texts from a look, not from an analysis:
        how often tokens follow each other tells common ones.
    drop_labels : sequence of str
        Labels of yours that are left out.

    Where ids are dropped or hashed, modules' integer inputs, which may be the ids, are left out;
    and where anything is, the names and hashes of the files that an import read.

    Raises
    ------
    ConfigError
        Both to be dropped and to be hashed, an empty key, or a value is of another kind.
    """

    drop_text: bool = False
    drop_token_ids: bool = False
    hash_text: str | None = field(default=None, repr=False)
    drop_labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("drop_text", "drop_token_ids"):
            if not isinstance(getattr(self, name), bool):
                msg = f"{name} must be True or False; got {getattr(self, name)!r}"
                raise ConfigError(msg)
        if self.hash_text is not None and not isinstance(self.hash_text, str):
            msg = f"hash_text must be a str, or None; got a {type(self.hash_text).__name__}"
            raise ConfigError(msg)
        check_strings("drop_labels", self.drop_labels)
        if self.hash_text is not None and (self.drop_text or not self.hash_text):
            msg = "hash_text wants a key that is not empty, and text that is not dropped"
            raise ConfigError(msg)

    @property
    def anything(self) -> bool:
        """Whether anything is taken out."""
        return bool(self.drop_text or self.drop_token_ids or self.hash_text or self.drop_labels)

    def of_text(self, values: NDArray[Any]) -> NDArray[Any]:
        """Give what texts become."""
        if self.drop_text:
            return np.full(values.shape, "", STRING)
        if self.hash_text is None:
            return values
        known = {one: self._digest(str(one))[:_DIGITS] for one in set(values.tolist()) if one}
        return np.array([known.get(one, "") for one in values.tolist()], STRING)

    def of_ids(self, values: NDArray[Any]) -> NDArray[Any]:
        """Give what ids become; −1, which is none, stays."""
        if self.drop_token_ids:
            return np.full_like(values, -1)
        if self.hash_text is None:
            return values
        known = {one: int(self._digest(str(one)), 16) % _IDS for one in set(values.tolist())}
        return np.array([-1 if one == -1 else known[one] for one in values.tolist()], np.int64)

    def _digest(self, text: str) -> str:
        return hmac.new((self.hash_text or "").encode(), text.encode(), hashlib.sha256).hexdigest()

    def said(self) -> dict[str, Any]:
        """Give what an archive says of it: never the key."""
        kept = "hashed" if self.hash_text else "kept"
        return {
            "text": "dropped" if self.drop_text else kept,
            "token_ids": "dropped" if self.drop_token_ids else kept,
            "dropped_labels": list(self.drop_labels),
        }

    def changed(self, folder: Path, root: Mapping[str, Any]) -> dict[str, NDArray[Any] | None]:
        """Give what of an archive is changed: arrays by path; None where they are left out.

        Raises
        ------
        ConfigError
            A label that is to be dropped is none of the sender's.
        """
        arrays = arrays_of(root)
        found: dict[str, NDArray[Any] | None] = {}
        yours = set(_labels(root))
        for name in self.drop_labels:
            if name not in yours:
                there = ", ".join(map(repr, sorted(yours))) or "none"
                msg = f"{name!r} is no label that can be dropped; {there} can"
                raise ConfigError(msg)
            found[name] = None
        texts, ids = _of_tokens(root)
        if self.drop_text or self.hash_text:
            for name in (*texts, f"tokens/{_TEXT}"):
                found[name] = self.of_text(_read(folder, name, arrays).astype(STRING))
        if self.drop_token_ids or self.hash_text:
            for name in (*ids, f"tokens/{_ID}"):
                found[name] = self.of_ids(_read(folder, name, arrays))
        if self.drop_token_ids or self.hash_text:
            found |= dict.fromkeys(_inputs(arrays))
        if self.anything and any(name.startswith("statistics/") for name in arrays):
            found["statistics"] = None  # by text, it may be; it can be made again
            found["text/statistics"] = None
        return found


@dataclass(frozen=True, slots=True)
class Leaving:
    """Something that is in what is shared.

    Attributes
    ----------
    name : str
        The array, or the attribute.
    kind : {"values", "token text", "token ids", "your label", "label", "metadata"}
        What it is.
    size : int
        How many elements.
    examples : str
        Some of them, as they leave; of values where they are from.
    """

    name: str
    kind: str
    size: int
    examples: str


def leaving(folder: Path, privacy: Privacy) -> list[Leaving]:
    """List what of an archive leaves, as it leaves: what tells most of what was read first."""
    root = read_root(folder)
    check_names(folder, root)
    arrays = arrays_of(root)
    changed = privacy.changed(folder, root)
    order = ("token text", "token ids", "your label", "metadata", "values", "label")
    found = list(_metadata(root, privacy))
    kinds = _kinds(root)
    for name, said in arrays.items():
        if name.startswith("text/") or any(
            values is None and (name == gone or name.startswith(f"{gone}/"))
            for gone, values in changed.items()
        ):
            continue
        size = int(np.prod(said["shape"], dtype=np.int64))
        if _is_part(name, arrays):
            continue
        if "source_dtype" in said["attributes"]:
            modules = said["attributes"]["modules"]
            named = list(modules.values() if isinstance(modules, dict) else modules)
            kind = "token ids" if name in _inputs(arrays) else "values"
            found.append(Leaving(name, kind, size, _short([one for one in named if one])))
            continue
        values = changed.get(name)
        values = _read(folder, name, arrays, most=_LOOKED_AT) if values is None else values
        distinct = list(dict.fromkeys(values.ravel()[:_LOOKED_AT].tolist()))
        found.append(Leaving(name, kinds.get(name, "label"), size, _short(distinct)))
    return sorted(found, key=lambda one: order.index(one.kind))


def _metadata(root: Mapping[str, Any], privacy: Privacy) -> Iterator[Leaving]:
    said = shared_attributes(root["attributes"], privacy)
    for run in said["runs"]:
        for model in run.get("models", []):
            path = (model.get("config") or {}).get("_name_or_path", "")
            yield Leaving("model", "metadata", 1, _short([model.get("class", ""), path]))
    yield Leaving("run_id", "metadata", len(said["runs"]),
                  _short([one.get("run_id", "") for one in said["runs"]]))  # fmt: skip
    for run in said["runs"]:
        if isinstance(run.get("imported"), dict):
            yield Leaving("imported", "metadata", 1, _short(list(run["imported"].values())))
    logs = said["provenance"]["logs"]
    names = [one["name"] for one in logs]
    yield Leaving(
        "provenance", "metadata", len(logs), _short([said["provenance"]["created"], *names])
    )


def shared_attributes(attributes: Mapping[str, Any], privacy: Privacy) -> dict[str, Any]:
    """Give the root attributes of what is shared: without folders of the sender's machine."""
    runs = []
    for run in attributes["runs"]:
        models = [
            {**one, "config": _without_folders(one.get("config"))} for one in run.get("models", [])
        ]
        kept = {**run, "models": models} if "models" in run else dict(run)
        if privacy.anything and isinstance(kept.get("imported"), dict):
            imported = kept["imported"].items()
            kept["imported"] = {key: one for key, one in imported if key in _OF_IMPORTS}
        runs.append(kept)
    return {**attributes, "runs": runs, "privacy": privacy.said()}


def _without_folders(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    config = {key: _without_folders(one) for key, one in config.items()}
    path = config.get("_name_or_path")
    if not isinstance(path, str):
        return config
    local = path.startswith(("/", ".", "~", "\\")) or path[1:2] == ":" or path.count("/") > 1
    return {**config, "_name_or_path": PurePath(path.replace("\\", "/")).name} if local else config


def _of_tokens(root: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Give the labels of rows that are texts of tokens, and that are ids."""
    by_dim = _row_labels(root)
    prefixes = [prefix_of(names) or "" for names in by_dim.values()]
    return [f"{one}{_TEXT}" for one in prefixes], [f"{one}{_ID}" for one in prefixes]


def _row_labels(root: Mapping[str, Any]) -> dict[str, list[str]]:
    labels = set(root["attributes"]["coordinates"].split())
    arrays = arrays_of(root)
    return {
        dim: [
            name for name in arrays if name in labels and arrays[name]["dimension_names"] == [dim]
        ]
        for dim in root["attributes"]["rows"]
    }


def _labels(root: Mapping[str, Any]) -> list[str]:
    """Give the labels of rows that the user brought."""
    found = []
    for names in _row_labels(root).values():
        prefix = prefix_of(names) or ""
        own = {f"{prefix}{one}" for one in (*ROW_LABELS, RUN, SOURCE_ROW)}
        found += [name for name in names if name not in own]
    added = root["attributes"].get("added", {})
    return list(dict.fromkeys([*found, *(one for one in added if "/" not in one)]))


def _kinds(root: Mapping[str, Any]) -> dict[str, str]:
    texts, ids = _of_tokens(root)
    found = dict.fromkeys([*texts, f"tokens/{_TEXT}"], "token text")
    found |= dict.fromkeys([*ids, f"tokens/{_ID}"], "token ids")
    return found | dict.fromkeys(_labels(root), "your label")


def _inputs(arrays: Mapping[str, Any]) -> list[str]:
    """Give the arrays of integers that modules were given: of an embedding, token ids."""
    return [
        name
        for name, said in arrays.items()
        if str(said["attributes"].get("site", "")).endswith("@in")
        and np.dtype(said["data_type"]).kind in "iu"
        and not {"code_offset", "scale_factor"} & said["attributes"].keys()
    ]


def _is_part(name: str, arrays: Mapping[str, Any]) -> bool:
    """Whether an array is a part of values that are codes."""
    ends = (SCALE, EXACT, f"{EXACT}_present")
    return any(
        name.endswith(end) and "precision" in _attributes(name.removesuffix(end), arrays)
        for end in ends
    )


def _attributes(name: str, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = arrays.get(name, {}).get("attributes", {})
    return found


def _read(
    folder: Path, name: str, arrays: Mapping[str, Any], most: int | None = None
) -> NDArray[Any]:
    shape = arrays[name]["shape"]
    part = tuple(slice(most if place == 0 else most and 8) for place in range(len(shape)))
    return store.read_part(folder, name, part)


def _short(values: Sequence[Any]) -> str:
    shown = ", ".join(repr(one) for one in values[:_EXAMPLES])
    more = len(values) > _EXAMPLES or len(shown) > _ROOM
    return shown[:_ROOM] + (" …" if more else "")
