"""Owns files that ``torch.save`` wrote; the only module of the bridges that imports torch.

A file is a ZIP of stored entries: a pickle, read by ``torch.load(weights_only=True)``, which makes
tensors and plain containers and nothing else, and a file for each storage, mapped and not copied.
Before that, the pickle's opcodes are looked through: only what tensors in plain containers need
may be named, for torch would also make, say, a ``bytearray`` of any length.
Of the mapping ``cache.cache_dict`` of TransformerLens 3.9.0 and 4.3.0 (``ActivationCache.py``),
and of any other from names to tensors, the names are layers.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from actstore.bridges.foreign import Array, Foreign, ForeignPass, Options, files_in
from actstore.bridges.named import labels_among, passes_of
from actstore.bridges.tensors import as_array, memory_of
from actstore.errors import ConfigError, FormatError

__all__ = ["load", "read", "recognises", "tensor_of"]

LAYOUT: Final = (
    "torch.save of names to tensors (TransformerLens 3.9.0 and 4.3.0: cache.cache_dict)"
)
_ENDINGS: Final = (".pt", ".pth")
_PICKLE_BYTES: Final = 64 << 20
_MOST_ENTRIES: Final = 1 << 17
#: What a pickle may name, and the opcodes that name by what is on the stack, or call otherwise.
_NAMED: Final = re.compile(
    r"collections OrderedDict|torch Size|torch \w+Storage|torch\.storage UntypedStorage"
    r"|torch (?:u?int\d+|b?float\d+\w*|complex\d+|bool)"
    r"|torch\._utils _rebuild_(?:tensor_v2|tensor_v3|parameter)"
)
_REFUSED: Final = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
_ZIP: Final = b"PK\x03\x04"


def recognises(source: Path) -> bool:
    """Whether it is such a file, or a folder of them, by name."""
    return bool(_paths(source))


def read(source: Path, options: Options) -> Foreign:
    """Give each file as passes, annotated with ``file`` where there are several."""
    paths = _paths(source)
    if not paths:
        msg = f"{source} holds no {' or '.join(_ENDINGS)} files"
        raise FormatError(msg)
    if options.tokens is not None and len(paths) > 1:
        msg = f"{source} has {len(paths)} files; tokens can be told for one at a time"
        raise ConfigError(msg)
    return Foreign(LAYOUT, paths, _passes(paths, options))


def load(path: Path) -> Any:
    """Load a file's tensors and containers, the former mapped.

    Raises
    ------
    FormatError
        It is no such file, holds anything else, or would be larger than it is.
    ConfigError
        torch isn't installed.
    """
    _check(path)
    try:
        import torch
    except ImportError:
        msg = f"{path} needs torch to be read: pip install 'actstore[torch]'"
        raise ConfigError(msg) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a pickle that isn't ours makes of the loader
        first = str(error).strip().partition("\n")[0]
        msg = (
            f"{path} holds more than tensors in plain containers, or is damaged; it was not "
            f"loaded ({type(error).__name__}: {first:.200}): save the tensors by name, such as "
            "torch.save(cache.cache_dict, path)"
        )
        raise FormatError(msg) from error


def tensor_of(value: Any, name: str, path: Path) -> Array:
    """Give a tensor of a file, which must be no larger than the file.

    Raises
    ------
    FormatError
        It is none, has no values, or repeats some.
    """
    try:
        found = as_array(value, f"{path}: {name!r:.80}")
        values = value.numel() if hasattr(value, "numel") else found[...].size
    except ConfigError as error:
        raise FormatError(str(error)) from None
    nbytes, size = values * found.dtype.itemsize, path.stat().st_size
    if nbytes > size or getattr(value, "is_meta", False):
        msg = f"{path}: {name!r:.80} would have {nbytes} bytes, in a file of {size}"
        raise FormatError(msg)
    return found


def _paths(source: Path) -> list[Path]:
    if source.is_dir():
        return files_in(source, *_ENDINGS)
    return [source] if source.name.endswith(_ENDINGS) else []


def _check(path: Path) -> None:
    """Refuse what is no ZIP of stored entries that are all inside the file."""
    with path.open("rb") as file:
        begins = file.read(len(_ZIP))
    if begins != _ZIP:
        msg = f"{path} is no file of torch.save (since 1.6); save it again, or as safetensors"
        raise FormatError(msg)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [one for one in entries if one.filename.endswith("data.pkl")]
            whole = len(pickles) == 1 and pickles[0].compress_type == zipfile.ZIP_STORED
            small = whole and pickles[0].file_size <= _PICKLE_BYTES
            pickled = archive.read(pickles[0]) if small else b""
    except Exception as error:  # whatever a ZIP that isn't one makes of its parser
        msg = f"{path} is no whole file of torch.save: {error}"
        raise FormatError(msg) from error
    size = path.stat().st_size
    packed = [one.filename for one in entries if one.compress_type != zipfile.ZIP_STORED]
    total = sum(one.file_size for one in entries)
    large = any(one.file_size > _PICKLE_BYTES for one in pickles)
    if packed or total > size or len(entries) > _MOST_ENTRIES or len(pickles) != 1 or large:
        msg = (
            f"{path}: wanted a ZIP of stored entries, one of them a pickle of at most "
            f"{_PICKLE_BYTES} bytes; found {len(entries)} entries of {total} bytes in a file of "
            f"{size}, {len(packed)} compressed, {len(pickles)} pickles"
        )
        raise FormatError(msg)
    _check_pickle(pickled, path)


def _check_pickle(data: bytes, path: Path) -> None:
    """Refuse a pickle that names anything but tensors, and what holds them."""
    try:
        found = [
            (opcode.name, str(argument))
            for opcode, argument, _ in pickletools.genops(data)
            if opcode.name == "GLOBAL" or opcode.name in _REFUSED
        ]
    except Exception as error:  # whatever bytes that are no pickle make of the parser
        msg = f"{path} holds no whole pickle: {error!s:.200}"
        raise FormatError(msg) from error
    for name, argument in found:
        if name in _REFUSED or not _NAMED.fullmatch(argument):
            msg = (
                f"{path}: its pickle has {name} {argument:.200}; only tensors in plain "
                "containers are loaded: save them by name, such as "
                "torch.save(cache.cache_dict, path)"
            )
            raise FormatError(msg)


def _passes(paths: list[Path], options: Options) -> Iterator[ForeignPass]:
    for path in paths:
        found = load(path)
        if not isinstance(found, Mapping):
            msg = f"{path} holds a {type(found).__name__}; wanted names to tensors"
            raise FormatError(msg)
        arrays, memory = {}, {}
        for name, value in found.items():
            if not isinstance(name, str):
                msg = f"{path}: a layer's name is text; found {name!r:.80}"
                raise FormatError(msg)
            arrays[name] = tensor_of(value, name, path)
            memory[name] = memory_of(value)
        labels = labels_among(arrays, options.tokens, str(path))
        for one in passes_of(arrays, labels, str(path), memory=memory):
            batch = one.axis.batch if one.axis is not None else 0
            extra = {"file": [path.name] * batch} if len(paths) > 1 and batch else {}
            yield ForeignPass(one.axis, one.firings, {**one.annotations, **extra})
