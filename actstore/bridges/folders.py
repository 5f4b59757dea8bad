"""Owns plain ``.npy`` and ``.safetensors`` files: an array for each layer, named as the layer.

Layouts: NumPy's NPY (numpy/lib/_format_impl.py, NumPy 2.4), without pickles; safetensors 0.8.0.
Of a folder of ``.npy`` files, each is a layer, those in subfolders with dots between. Safetensors
files whose tensors have the same names are as many passes; ones without a name in common are one.
Arrays named ``token_ids``, ``tokens`` or ``input_ids``, ``attention_mask`` and ``positions`` are
labels of the rows, as are those that `actstore.export_rows` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.bridges import safe_tensors
from actstore.bridges.foreign import Array, Foreign, ForeignPass, Options, files_in
from actstore.bridges.named import Labels, labels_among, passes_of
from actstore.bridges.tensors import as_array
from actstore.errors import ConfigError, FormatError

__all__ = ["LABELS", "read", "recognises"]

LAYOUT: Final = "NPY (NumPy 2.4), safetensors 0.8.0"
_NPY: Final = ".npy"
_SAFE: Final = ".safetensors"
#: In the metadata of a safetensors file of ours: the tensors that are labels.
LABELS: Final = "actstore.labels"
_MASK: Final = "is_padding"


def recognises(source: Path) -> bool:
    """Whether it is such a file, or a folder with some."""
    if source.is_dir():
        return bool(files_in(source, _NPY, _SAFE, deep=True))
    return source.name.endswith((_NPY, _SAFE))


def read(source: Path, options: Options) -> Foreign:
    """Give the arrays as passes; items are annotated with ``file`` where files are passes."""
    endings = (_NPY, _SAFE)
    paths = files_in(source, *endings, deep=True) if source.is_dir() else [source]
    npy = [path for path in paths if path.name.endswith(_NPY)]
    safe = [path for path in paths if path.name.endswith(_SAFE)]
    if bool(npy) == bool(safe):
        found = f"{len(npy)} and {len(safe)}"
        msg = f"{source} must have files of one kind, {_NPY} or {_SAFE}; found {found}"
        raise FormatError(msg)
    root = source if source.is_dir() else source.parent
    passes = _of_npy(npy, root, options) if npy else _of_safetensors(safe, options)
    return Foreign(LAYOUT, paths, passes)


def _of_npy(paths: Sequence[Path], root: Path, options: Options) -> Iterator[ForeignPass]:
    arrays: dict[str, Array] = {}
    for path in paths:
        relative = path.relative_to(root).as_posix().removesuffix(_NPY)
        name = relative.replace("/", ".")
        if name in arrays:
            msg = f"{root}: two files are called {name!r}; rename one"
            raise FormatError(msg)
        arrays[name] = _npy(path)
    yield from passes_of(arrays, labels_among(arrays, options.tokens, str(root)), str(root))


def _npy(path: Path) -> Array:
    """Map a file; no larger array than the file holds, and no pickle."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a header that isn't one makes of NumPy's parser
        msg = f"{path} is no whole NPY file of plain numbers: {error!s:.200}"
        raise FormatError(msg) from error
    if not isinstance(found, np.ndarray):
        msg = f"{path} is a {type(found).__name__}; save one array a file"
        raise FormatError(msg)
    try:
        return as_array(found, str(path))
    except ConfigError as error:
        raise FormatError(str(error)) from None


def _of_safetensors(paths: Sequence[Path], options: Options) -> Iterator[ForeignPass]:
    names = []
    for path in paths:
        with safe_tensors.opened(path) as (arrays, _):
            names.append(frozenset(arrays))
    apart = len(set[str]().union(*names)) == sum(map(len, names))
    if apart:
        with ExitStack() as stack:
            together: dict[str, Array] = {}
            labels = Labels()
            for path in paths:
                arrays, metadata = stack.enter_context(safe_tensors.opened(path))
                if LABELS in metadata:
                    labels = _our_labels(arrays, metadata, path)
                together |= arrays
            where = str(paths[0].parent if len(paths) > 1 else paths[0])
            if labels.ids is None:
                labels = labels_among(together, options.tokens, where)
            yield from passes_of(together, labels, where)
        return
    if len(set(names)) > 1:
        msg = (
            f"{paths[0].parent}: files must have the same tensors, or none in common; "
            f"{paths[0].name} has {sorted(names[0])[:4]}, others have others"
        )
        raise FormatError(msg)
    if options.tokens is not None:
        msg = f"tokens can be told for one file; {paths[0].parent} has {len(paths)} passes"
        raise ConfigError(msg)
    for path in paths:
        with safe_tensors.opened(path) as (arrays, metadata):
            ours = _our_labels(arrays, metadata, path) if LABELS in metadata else None
            labels = ours or labels_among(arrays, None, str(path))
            for one in passes_of(arrays, labels, str(path)):
                batch = one.axis.batch if one.axis is not None else 0
                extra = {"file": [path.name] * batch} if batch else {}
                yield ForeignPass(one.axis, one.firings, {**one.annotations, **extra})


def _our_labels(arrays: dict[str, Array], metadata: dict[str, str], path: Path) -> Labels:
    """Take the labels out of a file that `actstore.export_rows` wrote."""
    told: dict[str, NDArray[Any]] = {}
    try:
        listed = json.loads(metadata[LABELS])
    except (ValueError, RecursionError) as error:
        msg = f"{path}: its metadata {LABELS!r} is no JSON: {error!s:.200}"
        raise FormatError(msg) from error
    for name in listed if isinstance(listed, list) else []:
        array = arrays.pop(name, None) if isinstance(name, str) else None
        if array is not None and name in ("token_id", "position", _MASK):
            if len(array.shape) != 1:
                msg = f"{path}: {name!r} must be [rows]; found {array.shape}"
                raise FormatError(msg)
            told[name] = array[...]
    kept = {name: one.astype(np.int64) for name, one in told.items() if one.dtype.kind in "iu"}
    mask = told.get(_MASK)
    return Labels(
        ids=kept.get("token_id"),
        mask=None if mask is None else ~mask.astype(np.bool_),
        positions=kept.get("position"),
    )
