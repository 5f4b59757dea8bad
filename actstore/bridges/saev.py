"""Owns saev's shards: float32 [example, layer, token, feature] in ``acts000000.bin``, ….

Layout: protocol 2.1 of https://github.com/OSU-NLP-Group/saev
(``docs/src/developers/protocol.md`` and ``src/saev/data/shards.py`` at 3d73f1f), and that of saev
0.1.0 on PyPI (``saev/activations.py``), whose names differ and which has no ``shards.json``.
Every file has room for the examples of a full shard. ``data`` is a pickle, and is never looked
into.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from actstore.bridges.foreign import (
    Firing,
    Foreign,
    ForeignPass,
    Options,
    axis_of,
    number,
    pieces,
    read_json,
    within,
)
from actstore.errors import FormatError

__all__ = ["read", "recognises"]

LAYOUT: Final = "saev, protocol 2.1; saev 0.1.0"
_METADATA: Final = "metadata.json"
_SHARDS: Final = "shards.json"
_FIRST: Final = "acts000000.bin"
_SAID: Final = ("family", "ckpt", "vit_family", "vit_ckpt", "protocol", "cls_token")
_MOST_LAYERS: Final = 10_000
_MOST_SHARDS: Final = 1_000_000


def recognises(source: Path) -> bool:
    """Whether a folder has the metadata and a first shard."""
    return (source / _METADATA).is_file() and (source / _FIRST).is_file()


@dataclass(frozen=True, slots=True)
class _Shape:
    layers: tuple[int, ...]
    tokens: int
    features: int
    examples: int
    per_shard: int

    @property
    def example_bytes(self) -> int:
        return 4 * len(self.layers) * self.tokens * self.features


def read(source: Path, options: Options) -> Foreign:  # noqa: ARG001 - as every kind's
    """Give the examples as sequences of tokens without ids, annotated with their ``example``."""
    path = source / _METADATA
    said = read_json(path, dict)
    shape = _shape(said, path)
    if said.get("dtype", "float32") != "float32":
        msg = f"{path}: dtype must be 'float32'; found {said['dtype']!r:.80}"
        raise FormatError(msg)
    shards = _shards(source, shape)
    for shard, count in shards:
        found = shard.stat().st_size
        if found % max(shape.example_bytes, 1) or found < count * shape.example_bytes:
            msg = (
                f"{shard} has {found} bytes; {count} examples of {len(shape.layers)} layers, "
                f"{shape.tokens} tokens and {shape.features} features are "
                f"{count * shape.example_bytes}: it was cut, or its metadata.json is another's"
            )
            raise FormatError(msg)
    about = {name: said[name] for name in _SAID if isinstance(said.get(name), str | bool)}
    paths = [path, *(shard for shard, _ in shards)]
    return Foreign(LAYOUT, paths, _passes(shards, shape), about)


def _shape(said: dict[str, Any], path: Path) -> _Shape:
    layers: Any = said.get("layers")
    whole = isinstance(layers, list) and 0 < len(layers) <= _MOST_LAYERS
    if not whole or any(type(one) is not int or not -1000 < one < 1 << 20 for one in layers):
        msg = f"{path}: 'layers' must be a list of block indices; found {layers!r:.80}"
        raise FormatError(msg)
    if len(set(layers)) != len(layers):
        msg = f"{path}: 'layers' has a block twice: {layers!r:.80}"
        raise FormatError(msg)
    cls = said.get("cls_token")
    if type(cls) is not bool:
        msg = f"{path}: 'cls_token' must be true or false; found {cls!r:.80}"
        raise FormatError(msg)
    tokens = cls + number(
        said, ("content_tokens_per_example", "patches_per_ex", "n_patches_per_img"), path
    )
    budget = number(
        said, ("max_tokens_per_shard", "patches_per_shard", "n_patches_per_shard"), path
    )
    features = number(said, ("d_model", "d_vit"), path)
    if not tokens or not features:
        msg = f"{path}: an example has {tokens} tokens of {features} features; wanted some"
        raise FormatError(msg)
    return _Shape(
        tuple(layers),
        tokens,
        features,
        number(said, ("n_examples", "n_ex", "n_imgs"), path),
        budget // (tokens * len(layers)),
    )


def _shards(folder: Path, shape: _Shape) -> list[tuple[Path, int]]:
    """Give the shards, and how many examples each has."""
    if not (folder / _SHARDS).is_file():
        count = -(-shape.examples // max(shape.per_shard, 1))
        if count > _MOST_SHARDS or (count > 1 and not shape.per_shard):
            msg = f"{folder} would have {count} shards; see its {_METADATA}"
            raise FormatError(msg)
        ends = [min((one + 1) * shape.per_shard, shape.examples) for one in range(count)]
        return [
            (within(folder, f"acts{one:06}.bin"), end - one * shape.per_shard)
            for one, end in enumerate(ends)
        ]
    path = folder / _SHARDS
    found = []
    for one in read_json(path, list):
        if not isinstance(one, dict):
            msg = f"{path} must list objects; found {json.dumps(one)[:80]}"
            raise FormatError(msg)
        examples = number(one, ("n_examples", "n_ex"), path)
        found.append((within(folder, one.get("name")), examples))
    if sum(count for _, count in found) != shape.examples:
        total = sum(count for _, count in found)
        msg = f"{path} lists {total} examples; {_METADATA} says {shape.examples}"
        raise FormatError(msg)
    return found


def _passes(shards: list[tuple[Path, int]], shape: _Shape) -> Iterator[ForeignPass]:
    names = [f"layers.{layer}" for layer in shape.layers]
    row_bytes = 4 * shape.features * len(shape.layers)
    before = 0
    for path, count in shards:
        if not count:
            continue
        form = (count, len(shape.layers), shape.tokens, shape.features)
        values = np.memmap(path, "<f4", "r", shape=form)
        for items, places in pieces(count, shape.tokens, row_bytes):
            size = items.stop - items.start, places.stop - places.start
            yield ForeignPass(
                axis_of(size, start=places.start),
                [
                    Firing(name, np.ascontiguousarray(values[items, place, places]))
                    for place, name in enumerate(names)
                ],
                {"example": list(range(before + items.start, before + items.stop))},
            )
        before += count
