"""Owns what of an archive tells what was read: which labels, what is done to them, what leaves."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.archive import store
from actstore.archive.coordinates import ROW_LABELS, RUN, STRING, prefix_of
from actstore.errors import ConfigError

__all__ = ["Leaving", "Privacy", "leaving"]

_TEXT, _ID = "token_text", "token_id"
_EXAMPLES: Final = 3
_ROOM: Final = 60  # characters of examples
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
        equal tokens can be told, and which they are only by who has the key.
    drop_labels : sequence of str
        Labels of yours that are left out.

    Raises
    ------
    ConfigError
        Both to be dropped and to be hashed, or an empty key.
    """

    drop_text: bool = False
    drop_token_ids: bool = False
    hash_text: str | None = None
    drop_labels: Sequence[str] = ()

    def __post_init__(self) -> None:
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
        arrays = store.arrays_of(root)
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
    root = store.read_root(folder)
    arrays = store.arrays_of(root)
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
        if "source_dtype" in said["attributes"]:
            modules = said["attributes"]["modules"]
            named = list(modules.values() if isinstance(modules, dict) else modules)
            found.append(Leaving(name, "values", size, _short([one for one in named if one])))
            continue
        values = changed.get(name)
        values = _read(folder, name, arrays) if values is None else values
        distinct = list(dict.fromkeys(values.ravel()[:10_000].tolist()))
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
        runs.append({**run, "models": models} if "models" in run else run)
    return {**attributes, "runs": runs, "privacy": privacy.said()}


def _without_folders(config: Any) -> Any:
    path = config.get("_name_or_path") if isinstance(config, dict) else None
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
    arrays = store.arrays_of(root)
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
        own = {f"{prefix}{one}" for one in (*ROW_LABELS, RUN)}
        found += [name for name in names if name not in own]
    return found


def _kinds(root: Mapping[str, Any]) -> dict[str, str]:
    texts, ids = _of_tokens(root)
    found = dict.fromkeys([*texts, f"tokens/{_TEXT}"], "token text")
    found |= dict.fromkeys([*ids, f"tokens/{_ID}"], "token ids")
    return found | dict.fromkeys(_labels(root), "your label")


def _read(folder: Path, name: str, arrays: Mapping[str, Any]) -> NDArray[Any]:
    return store.read_part(folder, name, (slice(None),) * len(arrays[name]["shape"]))


def _short(values: Sequence[Any]) -> str:
    shown = ", ".join(repr(one) for one in values[:_EXAMPLES])
    more = len(values) > _EXAMPLES or len(shown) > _ROOM
    return shown[:_ROOM] + (" …" if more else "")
